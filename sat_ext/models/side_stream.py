"""Copies between GPU and CPU memory that run beside the computation. Between CPU tensors they are plain copies."""

import logging
import mmap
import os
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class SideStream:
    """The copies in one direction, in order, on a CUDA stream of their own."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def copy(self, source: Tensor, target: Tensor) -> "Transfer":
        """Start to copy `source` as it is at this point of the computation; asynchronous if the CPU side is
        page-locked."""
        device = next((t.device for t in (source, target) if t.is_cuda), None)
        if device is None:
            target.copy_(source)
            return Transfer(target)
        if self._stream is None:  # not earlier: the model is built on the CPU
            self._stream = torch.cuda.Stream(device)
        # `source` must be computed, and whatever used the memory of `target` before must be done
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return Transfer(target, source, self._stream)


class Transfer:
    """A copy under way, which keeps both sides until `finish`.

    GPU memory on either side belongs to the computing stream, and `finish` makes its next use there wait for the
    copy. We do not use `record_stream` for that: it frees memory only when the GPU has got that far, and the CPU,
    which is whole blocks ahead, would allocate more in the meantime."""

    def __init__(
        self, target: Tensor, source: Tensor | None = None, stream: torch.cuda.Stream | None = None
    ) -> None:
        self.target = target
        self._source, self._stream = source, stream
        self._copied = None if stream is None else stream.record_event()

    def finish(self) -> Tensor:
        """The target, for the computation from here on."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)
        self._source = self._copied = self._stream = None
        return self.target

    def __del__(self) -> None:
        if self._stream is not None:  # never finished, as its graph was dropped: the copy may still run
            for tensor in (self.target, self._source):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(self._stream)


def host_memory(size: int) -> Tensor:
    """CPU memory of `size` bytes (uint8), to be page-locked."""
    # Shared with forked processes. Of private memory that a GPU may write to, Linux copies every page at each fork
    # (`copy_present_page` in mm/memory.c), so each data worker would take as much again.
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size]


def page_lock(memory: Tensor) -> bool:
    """Page-lock `memory` of `host_memory`, so that copies to a GPU are asynchronous; unlocked when it is freed.

    False if the system refuses; the memory is then used unlocked."""
    # not `Tensor.pin_memory`, which copies into an allocation that is rounded up to a power of two
    # (aten/src/ATen/core/CachingHostAllocator.h)
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


def _unlock(cudart: Any, address: int, process: int) -> None:
    # a forked data worker inherits the memory, but not the lock
    if os.getpid() == process and int(cudart.cudaHostUnregister(address)) != 0:
        _take_error()


def _take_error() -> None:
    # PyTorch would raise a failed call's error after its next kernel. It has no cudaGetLastError to clear it, so
    # we launch a kernel that nothing depends on.
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
