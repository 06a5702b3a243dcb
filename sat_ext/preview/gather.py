"""From a run's YAML and index to the preview page's contents."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import islice

import numpy as np

from sat_ext.data.buckets import step_cost
from sat_ext.data.index import Index, probe_files
from sat_ext.data.params import name_sources
from sat_ext.data.schedule import Schedule
from sat_ext.data.stream import JointStream
from sat_ext.preview.charts import charts_of
from sat_ext.preview.findings import Facts, by_reason, find
from sat_ext.preview.report import BucketPart, Report, SourcePart
from sat_ext.preview.samples import show
from sat_ext.preview.uses import Uses, uses_of
from sat_ext.recipe import Recipe
from sat_ext.types import MediaInfo

LOOKED = 1000  # steps of the schedule: its shares are exact to a batch over any window
MOST_SAMPLES = 96  # on the page: about 3 MB of pictures
SAMPLES = {"image": 6, "video": 3}  # of one bucket
_MOST_LEFT_OUT = 2000  # files without a bucket that are probed again for the histograms, at some 10 ms each


def gather(yaml: Sequence[str], stream: JointStream, recipe: Recipe) -> Report:
    """The page of one stream, which reads the data of `recipe`."""
    index, schedule = stream.index, stream.schedule
    dropped = index.left_out["path"][:_MOST_LEFT_OUT].to_pylist()
    outcomes = probe_files(dropped, timeout=recipe.data.on_bad_sample.timeout)
    uses = uses_of(index, recipe.data.fps, [info for info, _ in outcomes if isinstance(info, MediaInfo)])
    clips, seconds, stills = _files(index, uses)
    # the samples of each cell in each of the first steps, on one GPU
    taken = np.zeros((LOOKED, len(schedule.cells)), dtype=np.int64)
    for step, parts in enumerate(islice(schedule.steps(), LOOKED)):
        for part in parts:
            taken[step, part.cell] = part.samples
    cost = np.array([step_cost(c.tokens, recipe.shape.hidden_size) for c in schedule.cells])
    work = taken @ cost
    sources = _sources(recipe, index, schedule, taken.sum(0))
    return Report(
        recipe=recipe,
        yaml=yaml,
        clips=clips,
        clip_time=timedelta(seconds=round(seconds)),
        stills=stills,
        world=schedule.world,
        looked=LOOKED,
        samples=int(taken.sum()) * schedule.world,
        efficiency=float(work.mean() / work.max()),
        findings=find(Facts(recipe=recipe, stream=stream, uses=uses, sources=sources)),
        sources=sources,
        buckets=_buckets(stream, taken, cost),
        charts=charts_of(uses, recipe.buckets, recipe.data.fps),
        reasons=by_reason([*index.bad, *index.dropped]),
    )


def _sources(recipe: Recipe, index: Index, schedule: Schedule, samples: np.ndarray) -> list[SourcePart]:
    mean = schedule.mean_samples * schedule.world
    parts = []
    for name, source in name_sources(recipe.sources, "sources").items():
        if name not in index.shares:  # a part of the mix that the source does not have
            continue
        own = [c.source == name for c in schedule.cells]
        records = sum(c.records for c in schedule.cells if c.source == name)
        asked = index.shares[name] / sum(index.shares.values())
        epoch = records / asked / mean
        parts.append(
            SourcePart(
                name=name,
                path=source.path,
                sampler=source.sampler,
                records=records,
                asked=asked,
                got=float(samples[own].sum() / samples.sum()),
                steps=epoch,
                epochs=recipe.train_iters * recipe.accumulation / epoch if recipe.train_iters else None,
            )
        )
    return parts


def _files(index: Index, uses: Uses) -> tuple[int, float, int]:
    """Clips, their seconds, and stills. A file that several sources use counts once."""
    parts = zip(index.table["path"].to_pylist(), index.table["start"].to_pylist())
    lengths = dict(zip(parts, uses.part["seconds"].tolist()))
    clips = {path for (path, _), seconds in lengths.items() if seconds}
    stills = {path for path, _ in lengths} - clips
    gone = uses.left_out["seconds"]
    seconds = sum(lengths.values()) + float(gone.sum())
    return len(clips) + int((gone > 0).sum()), seconds, len(stills) + int((gone == 0).sum())


def _buckets(stream: JointStream, taken: np.ndarray, cost: np.ndarray) -> list[BucketPart]:
    """`taken` are samples by step and cell, `cost` is of a sample of each cell."""
    cells = stream.schedule.cells
    used = sorted({c.bucket for c in cells})
    done = taken.sum(0) * cost
    most = max(1, MOST_SAMPLES // len(used))
    parts = []
    for bucket in used:
        own = [i for i, c in enumerate(cells) if c.bucket == bucket]
        shown, remark = show(stream, bucket, min(most, SAMPLES[bucket.kind]))
        rows = [g.rows for g in stream.index.groups if g.bucket == bucket]
        sizes = {n for n in taken[:, own].sum(1).tolist() if n} or {0}
        parts.append(
            BucketPart(
                bucket=bucket,
                records=sum(len(np.unique(r)) for r in rows),
                tokens=cells[own[0]].tokens,
                batch=" to ".join(str(n) for n in sorted({min(sizes), max(sizes)})),
                cost=float(cost[own[0]] / cost.max()),
                share=float(taken[:, own].sum() / taken.sum()),
                work_share=float(done[own].sum() / done.sum()),
                samples=shown,
                remark=remark,
            )
        )
    return parts
