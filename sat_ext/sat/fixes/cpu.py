"""Training on a CPU: SAT takes a GPU for granted."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from sat_ext.sat.standin import StandIn


def cpu_training(_args: argparse.Namespace) -> bool:
    """Symptom: without CUDA, SAT's timers and checkpoints die in `torch.cuda.synchronize` and `get_rng_state`."""
    return not torch.cuda.is_available()


def without_gpu(torch: Any) -> StandIn:
    """A `torch` whose calls to the GPU do nothing, for SAT's modules alone."""
    cuda = StandIn(
        torch.cuda,
        synchronize=lambda *_: None,
        get_rng_state=lambda *_: torch.empty(0, dtype=torch.uint8),  # SAT puts it into its checkpoints
        set_rng_state=lambda *_: None,
    )
    return StandIn(torch, cuda=cuda)


def no_compiler(_args: argparse.Namespace) -> bool:
    """Symptom: on a CPU, DeepSpeed compiles an operator at its first start, and a start killed meanwhile leaves
    a lock that every later one waits for without end."""
    return not torch.cuda.is_available()


def never_built(_build: Callable[[], Any]) -> None:
    """In place of `build_shm_op`, an all-reduce through shared memory: gloo's own does the same work."""
