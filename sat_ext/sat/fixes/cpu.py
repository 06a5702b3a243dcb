"""Training on a CPU: SAT takes a GPU for granted."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

import torch

from sat_ext.sat.fixes.standin import StandIn


def cpu_training(args: argparse.Namespace) -> bool:
    """Symptom: without CUDA, SAT's timers and checkpoints die in `torch.cuda.synchronize` and `get_rng_state`.

    SAT's modules see a `torch` whose calls to the GPU do nothing.
    """
    if torch.cuda.is_available():
        return False
    from sat.training import deepspeed_training, model_io, utils

    for module in (deepspeed_training, model_io, utils):
        cuda = StandIn(
            torch.cuda,
            synchronize=lambda *_: None,
            get_rng_state=lambda *_: torch.empty(0, dtype=torch.uint8),  # no GPU whose state could be kept
            set_rng_state=lambda *_: None,
        )
        module.torch = StandIn(module.torch, cuda=cuda)
    return True


def no_compiler(args: argparse.Namespace) -> bool:
    """Symptom: on a CPU, DeepSpeed compiles an operator at its first start, and a start killed meanwhile leaves
    a lock for which every later one waits without end.

    The operator is an all-reduce through shared memory; gloo's own does the same work.
    """
    if torch.cuda.is_available():
        return False
    backend: Any = import_module("deepspeed.comm.torch")  # as an attribute, that name is torch itself
    backend.build_shm_op = lambda: None
    return True
