"""Copies between a GPU and the CPU's memory that run beside the computation. On a CPU they are plain copies.

GPU memory of either side belongs to the stream that computes, and `Transfer.finish` puts its next use after the
copy there. PyTorch's other way, `record_stream`, gives memory free only when the GPU has got that far: the CPU,
which is whole blocks ahead, would ask for more in the meantime, and nothing would be saved.
"""

from __future__ import annotations

import logging
import mmap
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class SideStream:
    """One direction's copies, one after another, on a CUDA stream of their own."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, source: Tensor, target: Tensor) -> Transfer:
        """Begin to copy what the computation has made of `source` so far. Asynchronous where the side in the CPU's
        memory is page-locked."""
        device = next((t.device for t in (source, target) if t.is_cuda), None)
        if device is None:
            target.copy_(source)
            return Transfer(target)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))  # what used the memory of `target` before is done
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return Transfer(target, source, stream)


class Transfer:
    """A copy that has begun; it keeps both sides until it is finished."""

    def __init__(
        self, target: Tensor, source: Tensor | None = None, stream: torch.cuda.Stream | None = None
    ) -> None:
        self.target = target
        self._source, self._stream = source, stream
        self._copied = None if stream is None else stream.record_event()

    def finish(self) -> Tensor:
        """The target, for what is computed from here on."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)
        self._source = self._copied = self._stream = None
        return self.target

    def __del__(self) -> None:
        if self._stream is not None:  # never finished, by a graph that was thrown away
            for tensor in (self.target, self._source):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(self._stream)


def host_memory(size: int) -> Tensor:
    """CPU memory of `size` bytes (uint8), to be page-locked.

    It is shared with forked processes. Of private memory that a GPU may write to, Linux copies every page at each
    fork (`copy_present_page` in mm/memory.c): data workers would each take as much again.
    """
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]


def page_lock(memory: Tensor) -> bool:
    """Page-lock `memory` of `host_memory`, so that copies to a GPU are asynchronous; undone when it is let go of.

    `Tensor.pin_memory` would copy it, into an allocation that is rounded up to a power of two
    (aten/src/ATen/core/CachingHostAllocator.h). Memory that the system does not lock is used as it is; then False.
    """
    cudart, address = torch.cuda.cudart(), memory.data_ptr()
    status = int(cudart.cudaHostRegister(address, memory.nbytes, 0))
    if status != 0:
        _take_error()
        log.warning(
            "%.1f GB of CPU memory could not be page-locked (CUDA error %d); copies of it are slower. "
            "Free CPU memory, raise `ulimit -l`, or swap fewer blocks.",
            memory.nbytes / 1e9,
            status,
        )
        return False
    weakref.finalize(memory, _unlock, cudart, address, os.getpid())
    return True


def lock_weights(tensors: Iterable[Tensor]) -> None:
    """Move the tensors' data into page-locked memory, those that are not there yet. Where one cannot be locked,
    the others stay as they are, and it is not tried again."""
    failed = False
    for tensor in tensors:
        if getattr(tensor, "locked_at", None) == tensor.data_ptr():
            continue
        if not failed:
            memory = host_memory(tensor.nbytes)
            home = memory.view(tensor.dtype).view(tensor.shape)
            home.copy_(tensor.data)
            tensor.data = home
            tensor.lock = memory  # type: ignore[attr-defined]  # kept, and with it the lock, as long as the weights
            failed = not page_lock(memory)
        tensor.locked_at = tensor.data_ptr()  # type: ignore[attr-defined]


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules' weights are copies on `device`; after it, the very tensors from before, which are
    page-locked from the first time on: copies of pageable memory take several times as long."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    if device.type == "cuda":
        lock_weights(tensors)
    homes = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in zip(tensors, homes):
            tensor.data = home


def _unlock(cudart: Any, address: int, process: int) -> None:
    if os.getpid() == process and int(cudart.cudaHostUnregister(address)) != 0:
        _take_error()


def _take_error() -> None:
    """CUDA keeps the error of a failed call until someone asks for it, and PyTorch asks after each kernel: the
    next one would die of it. PyTorch offers no cudaGetLastError, so we launch a kernel that nothing depends on."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
