"""How much memory real modules take, counted on tensors that have none."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These keep mean and deviation in fp32 on a GPU whatever their input, and in the input's dtype on a CPU.
_NORMS = (torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_group_norm.default)


class Meter(TorchDispatchMode):
    """Bytes of the living storages that were made inside: `now`, and at most: `peak`, and `least_peak` without
    those that are set `aside`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.least_peak = self.aside = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _NORMS:
            out = (out[0], out[1].float(), out[2].float())
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._known:  # a view, or an operation in place
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.least_peak = max(self.least_peak, self.now - self.aside)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, nbytes: int) -> None:
        self.now -= nbytes

    def mark(self) -> int:
        """Forget the peaks so far; returns the bytes that are alive now."""
        self.peak, self.least_peak = self.now, self.now - self.aside
        return self.now


@contextmanager
def metering(module: nn.Module) -> Iterator[Meter]:
    """Count what is made inside. The weights of `module`, on the meta device, become fake tensors on a CPU, as are
    all tensors that are made inside.

    On fake tensors, attention runs the kernel that a CPU would choose, which needs as much memory as flash
    attention on a GPU. On the meta device all is much faster, but attention writes out all its scores."""
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(_fake(parameter), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = _fake(buffer)
        yield meter


@contextmanager
def metering_meta() -> Iterator[Meter]:
    """The same on the meta device, for modules without attention that are made inside, and without gradients."""
    with torch.device("meta"), torch.no_grad(), Meter() as meter:
        yield meter


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
