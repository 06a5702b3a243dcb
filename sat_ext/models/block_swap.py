"""Frozen weights of some of the transformer's blocks in CPU memory, each fetched just before its block computes.

Gradient checkpointing computes a block again in the backward pass, which fetches it again; autograd keeps that
copy until the block's gradients are computed. Trained weights, a LoRA's, stay where they are."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.models.side_stream import SideStream, Transfer, host_memory, page_lock

ALIGNMENT = 256  # bytes, as CUDA aligns what it allocates


def swap_blocks(blocks: nn.ModuleList, count: int) -> None:
    """Move the frozen weights of `count` of the blocks, evenly spread, to CPU memory."""
    stream = SideStream()
    SwapWindow([SwappedBlock(blocks[i * len(blocks) // count], stream) for i in range(count)])


class SwappedBlock:
    """A block whose frozen weights are in one piece of CPU memory, and while they are needed also on its device.

    Otherwise its parameters are empty, so that what moves, casts or broadcasts the model does not touch the
    weights; their device and dtype are the block's, and `whole_shape` is the weight's. State dicts save and load
    the weights."""

    def __init__(self, block: nn.Module, stream: SideStream) -> None:
        self.block, self.stream = block, stream
        self.fetched: Transfer | None = None
        self.home: list[Tensor] = []
        self.locked = False
        self.slots = [
            (owner, name)
            for path, owner in block.named_modules()
            for name in (*owner._parameters, *owner._buffers)
            if "lora_" not in path and getattr(owner, name) is not None
        ]
        for tensor in self.tensors:
            if isinstance(tensor, nn.Parameter) and not hasattr(tensor, "whole_shape"):
                tensor.whole_shape = tensor.shape  # type: ignore[attr-defined]
        self._pack([tensor.detach() for tensor in self.tensors])
        self.release()
        block.register_state_dict_pre_hook(lambda *_: self._show(self.home))
        block.register_load_state_dict_pre_hook(lambda *_: self._show(self.home))
        block.register_state_dict_post_hook(lambda *_: self.release())
        block.register_load_state_dict_post_hook(lambda *_: self.release())

    @property
    def tensors(self) -> list[Tensor]:
        """The frozen parameters and buffers, looked up: a module that is moved makes new buffers."""
        return [getattr(owner, name) for owner, name in self.slots]

    def fetch(self) -> None:
        """Begin to copy the weights to where the block computes, unless that has begun."""
        if self.fetched is not None:
            return
        tensors = self.tensors
        dtypes = [tensor.dtype for tensor in tensors]
        if [tensor.dtype for tensor in self.home] != dtypes:  # the model was cast since
            self._pack([tensor.to(dtype) for tensor, dtype in zip(self.home, dtypes)])
        device = tensors[0].device
        if device.type == "cuda" and not self.locked:  # not when it is built, as the device is known only now
            page_lock(self.host)
            self.locked = True  # or refused, which would be no different the next time
        self.fetched = self.stream.copy(self.host, torch.empty_like(self.host, device=device))

    def arrive(self) -> None:
        """Put the weights on the block's device."""
        self.fetch()
        assert self.fetched is not None
        self._show(_views(self.fetched.finish(), self.home))

    def release(self) -> None:
        """Drop the copy; autograd may still hold it for the block's gradients."""
        self.fetched = None
        self._show([torch.empty(0, dtype=t.dtype, device=t.device) for t in self.tensors])

    def _show(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value

    def _pack(self, values: list[Tensor]) -> None:
        # one piece, so that a block is one allocation and one copy
        self.host, self.locked = host_memory(sum(_room(v) for v in values)), False
        self.home = _views(self.host, values)
        for home, value in zip(self.home, values):
            home.copy_(value)


def _views(memory: Tensor, like: list[Tensor]) -> list[Tensor]:
    rooms = memory.split([_room(tensor) for tensor in like])
    return [room[: t.nbytes].view(t.dtype).view(t.shape) for room, t in zip(rooms, like)]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


class SwapWindow:
    """The swapped blocks, of which at most two are fetched: the one that computes, and the one after it."""

    def __init__(self, blocks: list[SwappedBlock]) -> None:
        self.blocks = blocks
        self._last = 0
        for index, swapped in enumerate(blocks):
            swapped.block.register_forward_pre_hook(partial(self._enter, index))

    def _enter(self, index: int, _block: nn.Module, _inputs: Any) -> None:
        """The block of this index is about to compute, in the forward pass or again in the backward pass."""
        following = self._following(index)
        # before anything is fetched, so that the copies take the memory of those that are dropped
        for other, swapped in enumerate(self.blocks):
            if other not in (index, following):
                swapped.release()
        self.blocks[index].arrive()
        self.blocks[following].fetch()
        self._last = index

    def _following(self, index: int) -> int:
        """The block that probably computes next. A wrong guess only costs time, as `arrive` fetches."""
        if index == 0:
            return 1  # of this forward pass or, at the end of a backward pass, of the next, whose first is here
        if torch.is_grad_enabled():
            turns = index == len(self.blocks) - 1  # the backward pass begins where the forward pass ended
            return index - 1 if turns or index <= self._last else index + 1
        return (index + 1) % len(self.blocks)
