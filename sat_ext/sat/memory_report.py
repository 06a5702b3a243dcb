"""The memory that a run is predicted to take, shown before anything is loaded, and at the end what it took.

Peaks are PyTorch's own count of what it allocated on the first rank's GPU, from the beginning of a micro-step to
the beginning of the next: forward and backward pass, and the optimizer's step if there is one."""

import argparse
import atexit
import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sat_ext.cogvideox import LATENT_SIDE, pixel_frames
from sat_ext.memory.plan import Plan, make_plan
from sat_ext.memory.run import run_from
from sat_ext.memory.table import gigabytes, of_buckets, of_one
from sat_ext.ranks import local_ranks, rank_and_world
from sat_ext.recipe import Recipe
from sat_ext.sat.run import recipe_in, run_of
from sat_ext.sat.side_files import write_side_file
from sat_ext.types import Bucket, groups_of

log = logging.getLogger(__name__)


@dataclass
class Measured:
    """The micro-steps of one bucket: the most bytes that PyTorch allocated and reserved, and the seconds of the
    newest ones. The first micro-step counts for neither, because it may make optimizer states, and cuDNN tries
    kernels with workspaces of gigabytes in it; `first` is what it allocated."""

    samples: int = 0
    steps: int = 0
    first: int = 0
    allocated: int = 0
    reserved: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


class MemoryReport:
    """`plan` is None if the run cannot be predicted; `measured` is by bucket. With `folder`, all of it is written
    there at the end, as `memory.json`."""

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan
        self.folder: Path | None = None
        self.measured: dict[str, Measured] = {}
        self._seen: Measured | None = None
        self._since = 0.0

    def seeing(self, data: Iterator[Any] | None) -> Iterator[Any] | None:
        """`data`, whose next batch says the bucket. None stays None: this rank gets its batches from another."""
        return None if data is None else map(self._see, data)

    def _see(self, batch: dict[str, Any]) -> dict[str, Any]:
        largest = max(groups_of(batch), key=lambda group: int(group["mp4"][0].numel()))  # which the others fill up
        self._seen = self.measured.setdefault(str(bucket_of(largest)), Measured(samples=len(largest["mp4"])))
        return batch

    def close(self) -> None:
        """End of a micro-step: what it took."""
        now, since, seen = time.monotonic(), self._since, self._seen
        self._since, self._seen = now, None
        gpu = torch.cuda.is_available()
        if seen is not None:
            seen.steps += 1
            if seen.steps > 1:
                seen.seconds.append(now - since)
            if gpu and seen.steps == 1:
                seen.first = torch.cuda.max_memory_allocated()
            elif gpu:
                seen.allocated = max(seen.allocated, torch.cuda.max_memory_allocated())
                seen.reserved = max(seen.reserved, torch.cuda.max_memory_reserved())
        if gpu:
            torch.cuda.reset_peak_memory_stats()

    def show(self) -> None:
        """The measured peaks beside the predicted ones."""
        if not self.measured:
            return
        if self.folder is not None and self.folder.is_dir():
            write_side_file(str(self.folder), "memory.json", json.dumps(self._data(), indent=1) + "\n")
        if not torch.cuda.is_available():
            print("memory: the peak was not measured, there is no GPU")
        elif self.plan is not None:
            peaks = {bucket: of.allocated for bucket, of in self.measured.items() if of.steps > 1}
            Console().print(of_buckets(self.plan, peaks))

    def _data(self) -> dict[str, Any]:
        """Measured values are None without a GPU, and for a bucket that came once."""
        peaks = {str(b.bucket): b.peak for b in self.plan.buckets} if self.plan else {}
        buckets = [
            {
                "bucket": bucket, "samples": of.samples, "steps": of.steps, "predicted": peaks.get(bucket),
                "allocated": of.allocated or None, "reserved": of.reserved or None, "first": of.first or None,
                "seconds": statistics.median(of.seconds) if of.seconds else None,
            }
            for bucket, of in self.measured.items()
        ]  # fmt: skip
        return {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "predicted": dict(self.plan.per_gpu) if self.plan else None,
            "buckets": buckets,
        }


def report_of(args: argparse.Namespace) -> MemoryReport:
    """The run's report. The first call on the first rank shows the plan, and warns if it does not fit."""
    run, recipe = run_of(args), recipe_in(args)
    if run.memory is None:
        first = rank_and_world()[0] == 0
        plan = _plan_of(recipe) if first else None
        report = run.memory = MemoryReport(plan)
        if first:
            atexit.register(report.show)
        if plan is not None:
            Console().print(of_one(plan), of_buckets(plan))
            _warn_if_too_large(plan)
    return run.memory


def measuring(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """SAT's `forward_step`. The previous micro-step is measured up to here, because SAT runs its backward pass and
    the update after `forward_step`."""

    def step(data: Any, model: Any, args: argparse.Namespace, *rest: Any, **options: Any) -> Any:
        report = report_of(args)
        report.close()
        report.folder = Path(args.save) if args.save and rank_and_world()[0] == 0 else None
        return forward_step(report.seeing(data), model, args, *rest, **options)

    return step


def bucket_of(batch: Mapping[str, Any]) -> Bucket:
    """The shape of a batch's pixels, or of the pixels that its latents were made from."""
    _, frames, channels, height, width = batch["mp4"].shape
    if channels != 3:
        return Bucket(frames=pixel_frames(frames), height=height * LATENT_SIDE, width=width * LATENT_SIDE)
    return Bucket(frames=frames, height=height, width=width)


def _plan_of(recipe: Recipe | None) -> Plan | None:
    if recipe is None:
        log.warning("memory: cannot be predicted for this run (data.target is not a class of sat_ext's)")
        return None
    _, world = rank_and_world()
    local = local_ranks(torch.cuda.device_count() or world)
    try:
        return make_plan(run_from(recipe), gpus=world, per_node=min(local, world))
    except Exception as error:  # any error: a run that may be fine must not end for want of a prediction
        reason = " ".join(str(error).split())  # diffusers' import errors have several lines
        log.warning("memory: cannot be predicted for this run (%s: %s)", type(error).__name__, reason)
        return None


def _warn_if_too_large(plan: Plan) -> None:
    if not torch.cuda.is_available():
        return
    there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if plan.gpu > there:
        log.warning(
            f"memory: this run is predicted to take {gigabytes(plan.gpu)} GB of a GPU that has {gigabytes(there)}"
            "; `sat-ext plan` with the same YAML says what to change"
        )
