"""The real modules at their published sizes, on tensors without memory: what is alive, and the most there was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the storages made inside that are alive (`now`), and the most there were (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
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
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, nbytes: int) -> None:
        self.now -= nbytes

    def mark(self) -> int:
        """Forget the peak so far; what is alive now."""
        self.peak = self.now
        return self.now


@contextmanager
def faked(module: nn.Module, dtype: torch.dtype) -> Iterator[Live]:
    """`module`, which is on the meta device, with weights that have a device and no memory; tensors too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
            for part in module.modules():
                for own in (part._parameters, part._buffers):
                    for name, tensor in own.items():
                        if tensor is not None:
                            own[name] = _like(tensor, dtype)
            yield live
    finally:
        torch.set_default_dtype(before)


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    made = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


@contextmanager
def saved_bytes(module: nn.Module, seen: Callable[[int], None]) -> Iterator[None]:
    """Calls `seen` with the bytes that autograd saved inside, each storage once, without parameters."""
    own = {id(p.untyped_storage()) for p in module.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            saved[id(storage)] = storage  # kept, so that the id is its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    seen(sum(s.nbytes() for s in saved.values()))
