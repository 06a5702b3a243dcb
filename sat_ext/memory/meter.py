"""What real modules take of memory, counted on tensors that have none."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# On a GPU these keep mean and deviation in fp32 whatever the dtype of their input, on a CPU in that dtype.
_NORMS = (torch.ops.aten.native_layer_norm.default, torch.ops.aten.native_group_norm.default)


class Meter(TorchDispatchMode):
    """Bytes of the storages made inside that are alive (`now`), and the most there were: `peak` of all,
    `least_peak` without those that are set `aside`."""

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
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.least_peak = max(self.least_peak, self.now - self.aside)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, nbytes: int) -> None:
        self.now -= nbytes

    def mark(self) -> int:
        """Forget the peaks so far; the bytes that are alive now."""
        self.peak, self.least_peak = self.now, self.now - self.aside
        return self.now


@contextmanager
def metering(module: nn.Module) -> Iterator[Meter]:
    """Count what is made inside. `module`, which is on the meta device, gets weights on a CPU without memory, and
    tensors that are made inside have none either.

    Attention runs on them by the kernel that a CPU would choose, whose memory is that of flash attention on a GPU.
    (Tensors on the meta device take far less time, but would get the kernel that writes out all scores.)
    """
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
    """The same for modules without attention that are made inside: all is on the meta device, and nothing can be
    differentiated."""
    with torch.device("meta"), torch.no_grad(), Meter() as meter:
        yield meter


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
