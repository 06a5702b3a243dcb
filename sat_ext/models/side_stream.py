"""Copies between a GPU and the CPU's memory that run beside the computation. On a CPU they are plain copies.

GPU memory of either side belongs to the stream that computes, and `Transfer.finish` puts its next use after the
copy there. PyTorch's other way, `record_stream`, gives memory free only when the GPU has got that far: the CPU,
which is whole blocks ahead, would ask for more in the meantime, and nothing would be saved.
"""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

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


def page_lock(memory: Tensor) -> None:
    """Page-lock CPU memory where it is, so that copies to a GPU are asynchronous; undone when it is let go of.

    `Tensor.pin_memory` would copy it, into an allocation that is rounded up to a power of two
    (aten/src/ATen/core/CachingHostAllocator.h). Memory that the system does not lock is used as it is.
    """
    cudart, address = torch.cuda.cudart(), memory.data_ptr()
    status = int(cudart.cudaHostRegister(address, memory.nbytes, 0))
    if status != 0:
        log.warning(
            "%.1f GB of CPU memory could not be page-locked (CUDA error %d); copies of it are slower. "
            "Raise `ulimit -l`, or swap fewer blocks.",
            memory.nbytes / 1e9,
            status,
        )
        return
    weakref.finalize(memory, cudart.cudaHostUnregister, address)
