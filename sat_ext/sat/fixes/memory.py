"""What an engine does for the memory of its GPU in every step."""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from typing import Any

import torch

from sat_ext.sat.fixes.standin import StandIn

FULL = 0.9  # of the GPU's memory is reserved: only then does emptying the cache help
COLLECT_EVERY = 100  # steps


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
