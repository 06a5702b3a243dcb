"""What an engine does for the memory of its GPU in every step."""

import argparse
import itertools
import os
import sys
from typing import Any

import torch

from sat_ext.sat.standin import StandIn

FULL = 0.9  # of the GPU's memory is reserved: only then does emptying the cache help
COLLECT_EVERY = 100  # steps
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # variables that set PyTorch's allocator
SEGMENTS = "expandable_segments:True"


def expandable_segments(_args: argparse.Namespace) -> bool:
    """Symptom: buckets of many sizes leave gaps in the GPU's memory that PyTorch has reserved, and a run dies of
    memory that is "reserved by PyTorch but unallocated"."""
    if not torch.cuda.is_available() or any(os.environ.get(name) for name in ALLOCATOR):  # the user's own setting
        return False
    new = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 9)  # warns of the older name
    os.environ[ALLOCATOR[new]] = SEGMENTS  # read at the allocator's first use
    if torch.cuda.is_initialized():  # CogVideo's script chooses its GPU before it loads the data class
        torch.cuda.memory._set_allocator_settings(SEGMENTS)
    return True


def empty_cache(_args: argparse.Namespace) -> bool:
    """Symptom: CogVideo's engine empties the GPU's cache and collects garbage in every step, which waits for all
    of the GPU's work and makes it ask the driver for its memory again."""
    return "diffusion_video" in sys.modules


def emptied_if_full(torch: Any) -> StandIn:
    """A `torch` that empties the cache where more than 90 % of the GPU's memory is reserved."""

    def empty_cache() -> None:
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            if torch.cuda.memory_reserved() > FULL * total:
                torch.cuda.empty_cache()

    return StandIn(torch, cuda=StandIn(torch.cuda, empty_cache=empty_cache))


def collected_seldom(gc: Any) -> StandIn:
    """A `gc` that collects garbage every 100 steps, beside Python's own collections."""
    calls = itertools.count(1)
    return StandIn(
        gc, collect=lambda *generation: gc.collect(*generation) if next(calls) % COLLECT_EVERY == 0 else 0
    )
