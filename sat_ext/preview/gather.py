"""From a run's YAML and index to the preview page's contents."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from sat_ext.cogvideox import SequenceShape, tokens
from sat_ext.data.buckets import step_cost
from sat_ext.data.clips import available_frames, find_sampler
from sat_ext.data.index import Index, probe_files
from sat_ext.data.params import DataConfig, name_sources
from sat_ext.data.schedule import Schedule
from sat_ext.data.stream import JointStream
from sat_ext.preview import charts
from sat_ext.preview.charts import Chart
from sat_ext.preview.findings import HEAVY_CUT, LETTERS_PER_TOKEN, Facts, find, needed_frames, reason_group
from sat_ext.preview.page import percent
from sat_ext.preview.report import BucketPart, Report, SourcePart
from sat_ext.preview.samples import show
from sat_ext.preview.uses import Uses, info_arrays, uses_of
from sat_ext.recipe import Recipe
from sat_ext.types import TIME_TOLERANCE, Bucket, MediaInfo

LOOKED = 1000  # steps of the schedule
MOST_SAMPLES = 96  # on the page: about 3 MB of pictures
SAMPLES = {"image": 6, "video": 3}  # of one bucket
_MOST_LEFT_OUT = 2000  # files without a bucket that are looked at again for the histograms
_LISTED = 8


def gather(
    *,
    yaml: Sequence[str],
    stream: JointStream,
    recipe: Recipe,
) -> Report:
    """The page of one stream, which reads the data of `recipe`."""
    index, data, schedule = stream.index, stream.config, stream.schedule
    uses = uses_of(index)
    dropped = [path for path, _ in index.dropped[:_MOST_LEFT_OUT]]
    outcomes = probe_files(dropped, timeout=data.on_bad_sample.timeout)
    left_out = [info for info, _ in outcomes if isinstance(info, MediaInfo)]
    looked = _look(schedule)
    steps = recipe.train_iters * recipe.accumulation if recipe.train_iters else None
    paths = {name: s.path for name, s in name_sources(recipe.sources, "sources").items()}
    sources = _sources(schedule, index, looked, paths, steps)
    clips, seconds, stills = _files(uses, index, left_out)
    short, of = _short(uses, index, data, left_out)
    engine, shape = recipe.engine, recipe.shape
    dropout = engine.condition_dropout if engine.is_conditioned else None
    buckets = _buckets(stream, uses, looked, shape, dropout)
    facts = Facts(
        data=data,
        index=index,
        uses=uses,
        cells=schedule.cells,
        batch_sizes=recipe.batch_sizes,
        sources=sources,
        short=short,
        clips=of,
        text_tokens=shape.text_length,
        bytes_per_token=1 if (engine.model.get("text") or {}).get("kind") == "byt5" else LETTERS_PER_TOKEN,
    )
    return Report(
        yaml=tuple(yaml),
        clips=clips,
        clip_seconds=seconds,
        stills=stills,
        left_out=len(index.bad) + len(index.dropped),
        world=schedule.world,
        looked=LOOKED,
        samples=int(looked @ _batches(schedule)),
        steps=max(s.steps for s in sources),
        train_iters=recipe.train_iters,
        still_share=sum(b.share for b in buckets if b.frames == 1),
        still_work=sum(b.work_share for b in buckets if b.frames == 1),
        efficiency=_efficiency(schedule, looked, shape),
        weighs=engine.weighs_losses,
        conditioning="none" if dropout is None else "i2v",
        findings=find(facts),
        sources=sources,
        buckets=buckets,
        charts=_charts(uses, left_out, data),
        reasons=_reasons([*index.bad, *index.dropped]),
    )


def _look(schedule: Schedule) -> np.ndarray:
    """How many of the first `LOOKED` steps each cell has."""
    cells = [step.cell for step in islice(schedule.steps(), LOOKED)]
    return np.bincount(cells, minlength=len(schedule.cells))


def _batches(schedule: Schedule) -> np.ndarray:
    """Samples of a step on all GPUs, by cell."""
    return np.array([c.batch * schedule.world for c in schedule.cells])


def _sources(
    schedule: Schedule, index: Index, looked: np.ndarray, paths: dict[str, str], steps: int | None
) -> tuple[SourcePart, ...]:
    batches = _batches(schedule)
    names = list(dict.fromkeys(c.source for c in schedule.cells))
    own = {n: np.array([c.source == n for c in schedule.cells]) for n in names}
    records = {n: sum(c.records for c in schedule.cells if c.source == n) for n in names}
    asked = {n: index.shares[n] / sum(index.shares[m] for m in names) for n in names}
    # steps per sample of the whole stream: a source's cells come in proportion to their records
    per_sample = sum(
        asked[c.source] * c.records / records[c.source] / batch for c, batch in zip(schedule.cells, batches)
    )
    samples = looked * batches
    parts = []
    for n in names:
        epoch = records[n] / asked[n] * per_sample
        parts.append(
            SourcePart(
                name=n,
                path=paths[n],
                sampler=index.samplers[n],
                records=records[n],
                asked=asked[n],
                got=float(samples[own[n]].sum() / samples.sum()),
                steps=epoch,
                epochs=steps / epoch if steps else None,
            )
        )
    return tuple(parts)


def _files(uses: Uses, index: Index, left_out: Sequence[MediaInfo]) -> tuple[int, float, int]:
    """Clips, their seconds, and stills. A file that several sources use counts once."""
    codes = np.asarray(index.table.column("path").combine_chunks().dictionary_encode().indices)[uses.row]
    starts = np.asarray(index.table.column("start"))[uses.row]
    parts = np.unique(np.stack([codes, starts]), axis=1, return_index=True)[1]
    clip = uses.clip
    clips = len(np.unique(codes[clip])) + sum(i.kind == "video" for i in left_out)
    seconds = float(uses.seconds[parts].sum()) + sum(i.duration for i in left_out)
    return clips, seconds, len(np.unique(codes[~clip])) + sum(i.kind == "image" for i in left_out)


def _short(uses: Uses, index: Index, data: DataConfig, left_out: Sequence[MediaInfo]) -> tuple[int, int]:
    """How many clips are shorter than `needed_frames`, and out of how many that are to be shown moving."""
    meant = uses.clip & np.array([not find_sampler(index.samplers[s]).still for s in uses.sources])[uses.source]
    gone = [i for i in left_out if i.kind == "video"]
    of = int(meant.sum()) + len(gone)
    needed = needed_frames(data)
    if needed is None:
        return 0, of
    # as `Window.available`: the last frame may be wanted at the clip's end, or less than 1 / fps after it starts
    late = 1 / data.fps - np.divide(1, uses.fps, out=np.zeros_like(uses.fps), where=uses.fps > 0) - TIME_TOLERANCE
    fills = uses.seconds + np.maximum(late, TIME_TOLERANCE) > (needed - 1) / data.fps
    return int((meant & ~fills).sum()) + sum(available_frames(i, data.fps) < needed for i in gone), of


def _efficiency(schedule: Schedule, looked: np.ndarray, shape: SequenceShape) -> float:
    work = _work(schedule, shape)
    return float((looked @ work) / (looked.sum() * work[looked > 0].max()))


def _work(schedule: Schedule, shape: SequenceShape) -> np.ndarray:
    """Of one step on one GPU, by cell."""
    return np.array([c.batch * step_cost(tokens(c.bucket, shape), shape.hidden_size) for c in schedule.cells])


def _buckets(
    stream: JointStream, uses: Uses, looked: np.ndarray, shape: SequenceShape, dropout: float | None
) -> tuple[BucketPart, ...]:
    schedule = stream.schedule
    samples, work = looked * _batches(schedule), _work(schedule, shape)
    costs = {b: step_cost(tokens(b, shape), shape.hidden_size) for b in uses.buckets}
    most = max(1, MOST_SAMPLES // len(uses.buckets))
    parts = []
    for number, bucket in enumerate(uses.buckets):
        own = np.array([c.bucket == bucket for c in schedule.cells])
        cells = [int(i) for i in np.flatnonzero(own)]
        wanted = min(most, SAMPLES["image" if bucket.frames == 1 else "video"])
        shown, remark = show(stream, bucket, wanted, conditioned=dropout is not None)
        parts.append(
            BucketPart(
                name=f"{bucket.width}×{bucket.height}",
                anchor=f"bucket-{bucket}",
                frames=bucket.frames,
                height=bucket.height,
                width=bucket.width,
                seconds=bucket.frames / stream.config.fps,
                records=int((uses.bucket == number).sum()),
                tokens=tokens(bucket, shape),
                batch=_span([schedule.cells[i].batch for i in cells], "d"),
                cost=costs[bucket] / max(costs.values()),
                work=float(work[own].max() / work.max()),
                loss_weight=_span([schedule.loss_weight(i) for i in cells], ".2f"),
                share=float(samples[own].sum() / samples.sum()),
                work_share=float((looked * work)[own].sum() / (looked @ work)),
                samples=tuple(shown),
                condition=_condition(bucket, dropout),
                remark=remark,
            )
        )
    return tuple(parts)


def _condition(bucket: Bucket, dropout: float | None) -> str:
    if dropout is None:
        return ""
    if bucket.frames == 1:
        return "The condition is dropped for every still: it would be the target itself."
    return f"The condition is the first frame; {percent(dropout)} of the visits train without it."


def _span(values: Sequence[float], form: str) -> str:
    """One number, or the least and the most of several."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _charts(uses: Uses, left_out: Sequence[MediaInfo], data: DataConfig) -> tuple[Chart, ...]:
    gone = info_arrays(left_out)
    heavy, fine = f"cut by more than {100 * HEAVY_CUT:.0f} %", "used"
    cut = uses.cut > HEAVY_CUT
    buckets = data.make_buckets()
    found = []
    moving_gone = gone["seconds"] > 0
    if uses.clip.any() or moving_gone.any():
        as_still = uses.clip & ~uses.moving
        found.append(
            charts.length_chart(
                "Length of clips",
                "Seconds of each clip. The lines are the buckets' lengths.",
                {
                    "trained on as clips": uses.seconds[uses.moving],
                    "one frame is used": uses.seconds[as_still],
                    "left out": gone["seconds"][moving_gone],
                },
                [(f / data.fps, f"{f}") for f in sorted({b.frames for b in buckets if b.frames > 1})],
            )
        )
    ratio = uses.width / uses.height
    found.append(
        charts.shape_chart(
            "Shape",
            "Width / height: upright on the left, lying on the right. The lines are the buckets' shapes.",
            {fine: ratio[~cut], heavy: ratio[cut], "left out": gone["width"] / gone["height"]},
            sorted({(b.width / b.height, f"{b.width}×{b.height}") for b in buckets}),
        )
    )
    side, small = np.minimum(uses.width, uses.height), uses.enlarged > 1
    found.append(
        charts.size_chart(
            "Size",
            "The shorter side in pixels. The lines are the buckets' shorter sides.",
            {
                "shrunk or as it is": side[~small],
                "enlarged": side[small],
                "left out": np.minimum(gone["width"], gone["height"]),
            },
            sorted({(float(min(b.height, b.width)), f"{min(b.height, b.width)}") for b in buckets}),
        )
    )
    return tuple(found)


def _reasons(gone: Sequence[tuple[str, str]]) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
    """Why files are left out, the most frequent reason first: how many, and some of them."""
    found: dict[str, list[str]] = {}
    for path, reason in gone:
        found.setdefault(reason_group(reason), []).append(f"{path}: {reason}")
    order = sorted(found, key=lambda r: -len(found[r]))
    return tuple((r, len(found[r]), tuple(found[r][:_LISTED])) for r in order)
