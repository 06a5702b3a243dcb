"""Gradient checkpointing of the transformer's blocks, whose inputs are kept on the GPU or in CPU memory."""

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sat_ext.models.config import GradientCheckpointing
from sat_ext.models.side_stream import SideStream, Transfer

TOKENS = 3  # dimensions (B, N, D) of a block's large inputs; its others are small, and the same for all blocks


class Checkpointing:
    """What diffusers' transformer calls instead of each block while gradients are enabled."""

    def __init__(self, blocks: nn.ModuleList, lever: GradientCheckpointing) -> None:
        # of every group the first, as the backward pass frees the activations of the last blocks first
        self.recomputed = set(list(blocks)[:: lever.every])
        self.inputs = OffloadedInputs() if lever.offload else None

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """The block's outputs."""
        if block not in self.recomputed:
            return block(*inputs)
        with nullcontext() if self.inputs is None else self.inputs.of_next_block():
            return checkpoint(block, *inputs, use_reentrant=False)


class OffloadedInputs:
    """Inputs of checkpointed blocks in page-locked CPU memory, copied while the GPU computes.

    An input is copied out while its block computes, and its GPU memory is free when the next block starts. In the
    backward pass a block's inputs are copied back while the block after it computes. With torch's `save_on_cpu`
    the GPU would wait for every copy, which it makes when the tensor is saved and used."""

    def __init__(self) -> None:
        self.out, self.back = SideStream(), SideStream()
        self.leaving: list[Transfer] = []
        self._last: weakref.ref[_Inputs] | None = None

    def of_next_block(self) -> saved_tensors_hooks:
        """Inside, what `checkpoint` saves of its arguments is offloaded; weights and activations, which it saves
        under hooks of its own, are not."""
        # not earlier, as the copies should run beside the block; not later, as its memory should serve this block
        self.settle()
        inputs = _Inputs(self, self._last)
        self._last = weakref.ref(inputs)  # only the graph holds a reference, so that they are freed with it
        return saved_tensors_hooks(inputs.pack, inputs.unpack)

    def settle(self) -> None:
        """Make the computation from here on wait for the copies of the last block's inputs."""
        for transfer in self.leaving:
            transfer.finish()
        self.leaving.clear()


class _Inputs:
    """Those of one block, and a reference to those of the block before it."""

    def __init__(self, owner: OffloadedInputs, before: "weakref.ref[_Inputs] | None") -> None:
        self.owner, self.before = owner, before
        self.saved: list[_Saved] = []

    def pack(self, tensor: Tensor) -> "Tensor | _Saved":
        if tensor.dim() != TOKENS:
            return tensor
        self.saved.append(_Saved(self.owner, tensor))
        return self.saved[-1]

    def unpack(self, packed: "Tensor | _Saved") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self.owner.settle()  # the last block's inputs may still be on their way out
        packed.fetch()
        # the block before is recomputed next: its inputs arrive while this block computes
        before = self.before and self.before()
        for saved in before.saved if before else ():
            saved.fetch()
        return packed.take()


class _Saved:
    """One offloaded tensor."""

    def __init__(self, owner: OffloadedInputs, tensor: Tensor) -> None:
        self.device, self.stream = tensor.device, owner.back
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        owner.leaving.append(owner.out.copy(tensor.detach(), self.host))
        self.coming: Transfer | None = None

    def fetch(self) -> None:
        """Start to copy it back, once."""
        if self.coming is None:
            self.coming = self.stream.copy(self.host, torch.empty_like(self.host, device=self.device))

    def take(self) -> Tensor:
        """The tensor. The copy is freed with the caller's reference."""
        assert self.coming is not None
        tensor, self.coming = self.coming.finish(), None
        return tensor
