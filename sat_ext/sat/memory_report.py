"""The memory that a run is predicted to take, shown before anything is loaded, and at the end what it took.

Peaks are those of PyTorch's own count of what it allocated on the first rank's GPU, from the beginning of a
micro-step to the beginning of the next: forward and backward pass, and the optimizer's step where there is one.
"""

import json
import logging
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
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
from sat_ext.sat.side_files import side_file
from sat_ext.types import Bucket

log = logging.getLogger(__name__)


@dataclass
class Measured:
    """Of the micro-steps of one bucket: bytes that PyTorch allocated and reserved at most, and what each took in
    seconds (of the newest ones). All without the first one, which may make optimizer states and looks for kernels:
    cuDNN tries them with workspaces of gigabytes. What that one allocated is `first`.
    """

    samples: int = 0
    steps: int = 0
    first: int = 0
    allocated: int = 0
    reserved: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


class MemoryReport:
    """`plan` is of this run, None where it cannot be predicted; `measured` is by bucket. With `folder`, all of it
    is written there at the end, as `memory.json`.
    """

    def __init__(self, plan: Plan | None, folder: Path | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.measured: dict[str, Measured] = {}
        self._seen: Measured | None = None
        self._since = 0.0

    def seeing(self, data: Iterator[Any] | None) -> Iterator[Any] | None:
        """`data`, of whose next batch the bucket is noted. None stays None: a rank that is given its batches."""
        return None if data is None else map(self._see, data)

    def _see(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._seen = self.measured.setdefault(str(bucket_of(batch)), Measured(samples=len(batch["mp4"])))
        return batch

    def close(self) -> None:
        """End of a micro-step: what it took."""
        now, since, seen = time.monotonic(), self._since, self._seen
        self._since, self._seen = now, None
        if seen is not None:
            if seen.steps:
                seen.seconds.append(now - since)
            seen.steps += 1
        if torch.cuda.is_available():
            if seen is not None and seen.steps == 1:
                seen.first = torch.cuda.max_memory_allocated()
            elif seen is not None:
                seen.allocated = max(seen.allocated, torch.cuda.max_memory_allocated())
                seen.reserved = max(seen.reserved, torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()

    def show(self) -> None:
        """The measured peaks beside the predicted ones."""
        if not self.measured:
            return
        if self.folder is not None and self.folder.is_dir():
            with side_file("memory.json"):
                (self.folder / "memory.json").write_text(json.dumps(self.data(), indent=1) + "\n")
        if not torch.cuda.is_available():
            print("memory: the peak was not measured, there is no GPU")
        elif self.plan is not None:
            peaks = {bucket: of.allocated for bucket, of in self.measured.items() if of.steps > 1}
            Console().print(of_buckets(self.plan, peaks))

    def data(self) -> dict[str, Any]:
        """Predicted bytes by part, and by bucket what was predicted and measured: None without a GPU, and
        where a bucket came once."""
        gpu = torch.cuda.is_available()
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
            "device": torch.cuda.get_device_name() if gpu else None,
            "predicted": dict(self.plan.per_gpu) if self.plan else None,
            "buckets": buckets,
        }


def bucket_of(batch: Mapping[str, Any]) -> Bucket:
    """The shape of a batch's pixels, or of those that its latents were made of."""
    _, frames, channels, height, width = batch["mp4"].shape
    if channels != 3:
        return Bucket(frames=pixel_frames(frames), height=height * LATENT_SIDE, width=width * LATENT_SIDE)
    return Bucket(frames=frames, height=height, width=width)


def plan_of(recipe: Recipe | None) -> Plan | None:
    """What the run is predicted to take; None, with a warning that says why, where it cannot be predicted."""
    if recipe is None:
        log.warning("memory: cannot be predicted for this run (data.target is not a class of sat_ext's)")
        return None
    _, world = rank_and_world()
    local = local_ranks(torch.cuda.device_count() or world)
    try:
        return make_plan(run_from(recipe), gpus=world, per_node=min(local, world))
    except Exception as error:  # whatever it is, it must not end a run that may be fine
        reason = " ".join(str(error).split())  # diffusers' errors of import have several lines
        log.warning("memory: cannot be predicted for this run (%s: %s)", type(error).__name__, reason)
        return None


def show_plan(plan: Plan) -> None:
    """Print it, and warn where this GPU has less memory."""
    Console().print(of_one(plan), of_buckets(plan))
    if not torch.cuda.is_available():
        return
    there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    if plan.gpu > there:
        log.warning(
            "memory: this run is predicted to take %s GB of a GPU that has %s; `sat-ext plan` with the same YAML "
            "says what to change",
            gigabytes(plan.gpu),
            gigabytes(there),
        )
