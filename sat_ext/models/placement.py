"""Weights that are on the GPU for a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules' weights are copies on `device`; after it, the very tensors from before."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    homes = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home
