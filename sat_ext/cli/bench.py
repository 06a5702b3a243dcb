"""`sat-ext bench`: how fast a data worker makes batches of the user's own data, and where its time goes."""

import json
import math
import time
from collections import defaultdict
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

from sat_ext.cli.base import BaseOption, MoreYaml, probing
from sat_ext.data.index import Index, build_index
from sat_ext.data.stream import JointStream
from sat_ext.data.transform import Fit
from sat_ext.data.visits import MediaReader, read_pixels
from sat_ext.recipe import Recipe, read_recipe
from sat_ext.types import Bucket


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
    index = build_index(run.sources, run.data, probing=probing(console))
    buckets = _by_stage(index, run, steps, console)
    seconds = _through_a_worker(index, run, steps, console)
    unseen = sorted({str(group.bucket) for group in index.groups} - {times.bucket for times in buckets})
    # an optimizer step consumes a batch for each micro-step whose gradients it accumulates
    needed = step_time and math.ceil(run.accumulation * seconds / step_time)
    if as_json:
        facts = {"steps": steps, "buckets": [asdict(b) for b in buckets], "unseen": unseen}
        facts |= {"seconds_per_batch": seconds, "workers": run.num_workers, "workers_needed": needed}
        print(json.dumps({**facts, "batches_per_step": run.accumulation, "step_time": step_time}))
        return
    _show_stages(buckets)
    if unseen:
        print(f"Not among these {steps} batches, and not counted: {', '.join(unseen)}; raise --steps.")
    print(f"One worker makes a batch in {seconds:.3f} s, all included.")
    workers, of = run.num_workers, f" of {run.accumulation} batches" if run.accumulation > 1 else ""
    if needed:
        whose = f"args.num_workers, per rank; it is {workers}"
        print(f"Steps of {step_time:g} s{of} are fed by {needed} worker{'s' * (needed > 1)} ({whose}).")
    elif workers:
        least = run.accumulation * seconds / workers
        print(f"The {workers} of args.num_workers feed steps{of} of {least:.3f} s or more.")
    else:
        print("args.num_workers is 0: each step waits for its batch.")


@dataclass(frozen=True, kw_only=True)
class BucketTimes:
    """Average milliseconds that a sample of one bucket took in each stage."""

    bucket: str
    kind: str
    samples: int
    decode: float
    fit: float
    collate: float


class _TimedRead:
    """`read_pixels` in this process, which notes how many seconds decoding and fitting took."""

    def __init__(self) -> None:
        self.decoding = self.fitting = 0.0

    def __call__(self, path: str, times: Any, decoder: Any, fit: Fit, *rest: Any) -> np.ndarray:
        start, before = time.perf_counter(), self.fitting
        pixels = read_pixels(path, times, decoder, _TimedFit(fit, self), *rest)  # type: ignore[arg-type]
        # frames are fitted one by one while others are decoded
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
    """The first steps' batches, made in this process and without a guard."""
    read = _TimedRead()
    stream = _stream(index, run, MediaReader(index, run.data, read))
    torch.set_num_threads(1)  # as PyTorch sets it in data workers
    spent: dict[Bucket, np.ndarray] = defaultdict(lambda: np.zeros(4))  # samples, and seconds by stage
    parts = [part for step in islice(stream.schedule.steps(), steps) for part in step]
    for part in track(parts, "by stage", console=console):
        read.decoding = read.fitting = 0.0
        start = time.perf_counter()
        stream.collated(part.cell, stream.schedule.positions(part, rank=0))
        rest = time.perf_counter() - start - read.decoding - read.fitting
        spent[index.groups[part.cell].bucket] += part.samples, read.decoding, read.fitting, rest
    found = []
    for bucket, (samples, *stages) in sorted(spent.items()):
        decode, fit, collate = (float(1e3 * seconds / samples) for seconds in stages)
        times = {"decode": decode, "fit": fit, "collate": collate}
        found.append(BucketTimes(bucket=str(bucket), kind=bucket.kind, samples=int(samples), **times))
    return found


class _Batches(IterableDataset[dict[str, Any]]):
    """Batches from step `start` on."""

    def __init__(self, stream: JointStream, start: int, length: int) -> None:
        self._stream, self._start, self._length = stream, start, length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self._stream.batches(start=self._start, rank=0), self._length)


def _through_a_worker(index: Index, run: Recipe, steps: int, console: Console) -> float:
    """Average seconds per batch of one data worker: read under guard, collated and handed over.

    These are the steps after those of `_by_stage`, whose files the system has cached by now."""
    batches = DataLoader(_Batches(_stream(index, run), steps, steps + 1), batch_size=None, num_workers=1)
    times = [time.perf_counter() for _ in track(batches, "through a worker", total=steps + 1, console=console)]
    return (times[-1] - times[0]) / steps  # without the first, which waits for the worker to start


def _stream(index: Index, run: Recipe, reader: MediaReader | None = None) -> JointStream:
    dtype = run.engine.batch_dtype(run.dtype)
    return JointStream(index, run.data, size=run.step_size, world=1, dtype=dtype, reader=reader)


def _show_stages(buckets: list[BucketTimes]) -> None:
    table = Table("bucket", "kind", box=None)
    for column in ("samples", "decode ms", "fit ms", "collate ms", "samples/s"):
        table.add_column(column, justify="right")
    for times in buckets:
        stages = times.decode, times.fit, times.collate
        shown = [f"{ms:,.1f}" for ms in (*stages, 1e3 / sum(stages))]
        table.add_row(times.bucket, times.kind, str(times.samples), *shown)
    Console().print(table)
