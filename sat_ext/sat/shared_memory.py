"""Whether the batches that wait in the data workers fit the memory in which they are handed over."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from sat_ext.data.stream import JointStream
from sat_ext.errors import ConfigError
from sat_ext.ranks import local_ranks, on_every_rank
from sat_ext.sat.run import run_of

FOLDER = Path("/dev/shm")
MB = 1_000_000


def check_shared_memory(args: argparse.Namespace, stream: JointStream) -> None:
    """Raise `ConfigError` on every rank if this list of data, with those before it, could fill /dev/shm.

    PyTorch would end in a traceback, or wait forever for the batch that a worker could not hand over. It counts as
    many of the largest batches as the workers of all ranks of a machine may have ready at once."""
    if not args.num_workers:
        return
    largest = 3 * stream.size.most_pixels(c.bucket for c in stream.schedule.cells) * stream.dtype.itemsize
    world = dist.get_world_size()
    local = min(world, local_ranks(torch.cuda.device_count() or world))
    run = run_of(args)
    needed = run.shared_memory = run.shared_memory + local * args.num_workers * args.prefetch_factor * largest

    def look() -> None:
        free = _free()
        if free is not None and needed > free:
            raise ConfigError(
                f"{FOLDER}: {free // MB} MB are free, but batches of up to {-(-largest // MB)} MB, for {local} "
                f"ranks x {args.num_workers} workers (args.num_workers) x {args.prefetch_factor} "
                f"(args.prefetch_factor) for each list of data, may need {-(-needed // MB)} MB; start the "
                f"container with --shm-size={-(-needed // 1_000_000_000)}g, or lower these numbers (0 workers "
                "need none)."
            )

    on_every_rank(look)


def _free() -> int | None:
    """Bytes; None if the system has no such folder."""
    try:
        found = os.statvfs(FOLDER)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
