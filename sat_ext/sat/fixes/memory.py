"""What an engine does for the memory of its GPU in every step."""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
from typing import Any

import torch

from sat_ext.sat.fixes.standin import StandIn

FULL = 0.9  # of the GPU's memory is reserved: only then does emptying the cache help
COLLECT_EVERY = 100  # steps
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # variables that set PyTorch's allocator
SEGMENTS = "expandable_segments:True"


def expandable_segments(args: argparse.Namespace) -> bool:
    """Symptom: buckets of many sizes leave gaps in the GPU's memory that PyTorch has reserved, and a run dies of
    memory that is "reserved by PyTorch but unallocated".

    The allocator's segments grow instead. A setting of the user's in PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF
    stays as it is.
    """
    if not torch.cuda.is_available() or any(os.environ.get(name) for name in ALLOCATOR):
        return False
    new = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 9)  # warns of the older name
    os.environ[ALLOCATOR[new]] = SEGMENTS  # read at the allocator's first use
    if torch.cuda.is_initialized():  # CogVideo's script chooses its GPU before it loads the data class
        torch.cuda.memory._set_allocator_settings(SEGMENTS)
    return True


def empty_cache(args: argparse.Namespace) -> bool:
    """Symptom: CogVideo's engine empties the GPU's cache and collects garbage in every step, which waits for all
    of the GPU's work and makes it ask the driver for its memory anew.

    The cache is emptied where more than 90 % of the GPU's memory is reserved, and garbage is collected every
    100 steps, beside Python's own collections.
    """
    module: Any = sys.modules.get("diffusion_video")
    if module is None:
        return False
    module.torch = StandIn(torch, cuda=StandIn(torch.cuda, empty_cache=_empty_if_full))
    module.gc = StandIn(gc, collect=_seldom())
    return True


def _empty_if_full() -> None:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if torch.cuda.memory_reserved() > FULL * total:
            torch.cuda.empty_cache()


def _seldom() -> Any:
    calls = itertools.count(1)
    return lambda *generation: gc.collect(*generation) if next(calls) % COLLECT_EVERY == 0 else 0
