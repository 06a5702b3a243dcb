"""`sat-ext bench`: how fast a data worker makes batches of the user's own data, and where its time goes."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from sat_ext.cli.base import BaseOption, MoreYaml
from sat_ext.data.index import Index, build_index
from sat_ext.data.stream import JointStream
from sat_ext.data.transform import Fit
from sat_ext.data.visits import MediaReader, read_pixels
from sat_ext.recipe import Recipe, read_recipe


def bench(
    base: BaseOption,
    more: MoreYaml = None,
    steps: Annotated[int, typer.Option(min=2, help="batches to make, of each measurement")] = 40,
    step_time: Annotated[
        float | None, typer.Option(min=0.001, metavar="SECONDS", help="what a training step takes, to be kept fed")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure how fast data workers are, by stage, and how many of them keep the training fed."""
    run = read_recipe([*base, *(more or [])]).checked()
    console = Console(stderr=True)
    index = build_index(
        run.sources,
        run.data,
        probing=lambda found, total: track(found, description="probing files", total=total, console=console),
    )
    buckets = _by_stage(index, run, steps, console)
    seconds = _through_a_worker(index, run, steps, console)
    seen = {times.bucket for times in buckets}
    unseen = sorted({str(group.bucket) for group in index.groups} - seen)
    if as_json:
        facts = _advice(seconds, run, step_time)
        print(json.dumps({"steps": steps, "buckets": [asdict(b) for b in buckets], "unseen": unseen, **facts}))
        return
    _show_stages(buckets)
    if unseen:
        print(f"Not among these {steps} batches, and not counted: {', '.join(unseen)}; raise --steps.")
    _show_advice(seconds, run, step_time)


@dataclass(kw_only=True)
class BucketTimes:
    """What the samples of one bucket took, in milliseconds each on average."""

    bucket: str
    kind: str
    samples: int = 0
    decode: float = 0.0
    fit: float = 0.0
    collate: float = 0.0

    @property
    def total(self) -> float:
        """All stages together."""
        return self.decode + self.fit + self.collate


class _TimedRead:
    """`read_pixels` in this process, with a clock on it."""

    def __init__(self) -> None:
        self.decoding = self.fitting = 0.0

    def __call__(self, path: str, *args: Any) -> np.ndarray:
        times, decoder, fit, seen = args
        start, before = time.perf_counter(), self.fitting
        pixels = read_pixels(path, times, decoder, _TimedFit(fit, self), seen)  # type: ignore[arg-type]
        self.decoding += time.perf_counter() - start - (self.fitting - before)
        return pixels


class _TimedFit:
    def __init__(self, fit: Fit, clock: _TimedRead) -> None:
        self._fit, self._clock, self.least = fit, clock, fit.least

    def __call__(self, pixels: np.ndarray, shown: tuple[int, int] | None = None) -> torch.Tensor:
        start = time.perf_counter()
        fitted = self._fit(pixels, shown)
        self._clock.fitting += time.perf_counter() - start
        return fitted


def _by_stage(index: Index, run: Recipe, steps: int, console: Console) -> list[BucketTimes]:
    """The first steps' batches, made here and without a guard."""
    read = _TimedRead()
    stream = _stream(index, run, MediaReader(index, run.data, read))
    torch.set_num_threads(1)  # as PyTorch sets it in data workers
    found: dict[str, BucketTimes] = {}
    for step in track(islice(stream.schedule.steps(0), steps), "by stage", total=steps, console=console):
        read.decoding = read.fitting = 0.0
        start = time.perf_counter()
        samples = len(stream.batch(step, 0)["txt"])
        rest = time.perf_counter() - start - read.decoding - read.fitting
        bucket = stream.index.groups[step.cell].bucket
        kind = "image" if bucket.frames == 1 else "video"
        times = found.setdefault(str(bucket), BucketTimes(bucket=str(bucket), kind=kind))
        for name, spent in (("decode", read.decoding), ("fit", read.fitting), ("collate", rest)):
            mean = getattr(times, name)
            setattr(times, name, mean + (1e3 * spent - samples * mean) / (times.samples + samples))
        times.samples += samples
    return [found[name] for name in sorted(found, key=lambda n: [int(part) for part in n.split("x")])]


class _Batches(IterableDataset[dict[str, Any]]):
    """Batches from step `start` on."""

    def __init__(self, stream: JointStream, start: int, length: int) -> None:
        self._stream, self._start, self._length = stream, start, length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self._stream.batches(start=self._start, rank=0), self._length)


def _through_a_worker(index: Index, run: Recipe, steps: int, console: Console) -> float:
    """Seconds a batch, on average, of one data worker: read under guard, collated and handed over.

    They are the steps after those of `_by_stage`, whose files are in the system's cache by now.
    """
    batches = DataLoader(_Batches(_stream(index, run), steps, steps + 1), batch_size=None, num_workers=1)
    start = end = 0.0
    for number, _ in enumerate(track(batches, "through a worker", total=steps + 1, console=console)):
        end = time.perf_counter()
        start = end if number == 0 else start  # what starting a worker takes is not counted
    return (end - start) / steps


def _stream(index: Index, run: Recipe, reader: MediaReader | None = None) -> JointStream:
    dtype = run.engine.batch_dtype(run.dtype)
    return JointStream(index, run.data, batch_sizes=run.batch_sizes, world=1, dtype=dtype, reader=reader)


def _advice(seconds: float, run: Recipe, step_time: float | None) -> dict[str, float]:
    """A training step of `step_time` seconds takes as many batches as the run accumulates gradients of."""
    facts: dict[str, float] = {"seconds_per_batch": seconds, "workers": run.num_workers}
    if step_time is not None:
        needed = math.ceil(run.accumulation * seconds / step_time)
        facts |= {"batches_per_step": run.accumulation, "step_time": step_time, "workers_needed": needed}
    return facts


def _show_stages(buckets: list[BucketTimes]) -> None:
    table = Table("bucket", "kind", box=None)
    for column in ("samples", "decode ms", "fit ms", "collate ms", "samples/s"):
        table.add_column(column, justify="right")
    for times in buckets:
        shown = [f"{ms:,.1f}" for ms in (times.decode, times.fit, times.collate)]
        table.add_row(times.bucket, times.kind, str(times.samples), *shown, f"{1e3 / times.total:,.1f}")
    Console().print(table)


def _show_advice(seconds: float, run: Recipe, step_time: float | None) -> None:
    workers, batches = run.num_workers, run.accumulation
    print(f"One worker makes a batch in {seconds:.3f} s, all included.")
    of = f" of {batches} batches" if batches > 1 else ""
    if step_time is not None:
        needed = int(_advice(seconds, run, step_time)["workers_needed"])
        whose = f"args.num_workers, per rank; it is {workers}"
        print(f"Steps of {step_time:g} s{of} are fed by {needed} worker{'s' * (needed > 1)} ({whose}).")
    elif workers:
        print(f"The {workers} of args.num_workers feed steps{of} of {batches * seconds / workers:.3f} s or more.")
    else:
        print("args.num_workers is 0: each step waits for its batch.")
