"""Frozen blocks of the transformer in CPU memory, on the GPU only for their turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def swapped_indices(number: int, blocks: int) -> list[int]:
    """Which of the blocks are swapped: spread evenly, so that those between give their copies time.

    >>> swapped_indices(2, 6), swapped_indices(3, 3), swapped_indices(0, 3)
    ([2, 5], [0, 1, 2], [])
    """
    return [i for i in range(blocks) if (i + 1) * number // blocks > i * number // blocks]


def swap_blocks(blocks: Sequence[nn.Module], number: int) -> list[SwappedBlock]:
    """Keep frozen weights of `number` of the blocks on the CPU. Gradient checkpointing must recompute each."""
    swapped = [SwappedBlock(blocks[i]) for i in swapped_indices(number, len(blocks))]
    for before, after in zip(swapped, swapped[1:]):
        before.next, after.previous = after, before
    return swapped


class SwappedBlock:
    """One block, whose frozen weights are on the CPU whenever it does not compute.

    They are fetched when its forward begins, the next block's right behind them, and let go when it ends. The
    backward pass, in which checkpointing computes the forward anew, does the same in the other direction; what has
    to be kept of the weights until the gradients are through, autograd holds, which saved the fetched ones. So at
    most two swapped blocks are on the GPU.
    """

    def __init__(self, block: nn.Module) -> None:
        self.next: SwappedBlock | None = None
        self.previous: SwappedBlock | None = None
        self.homes: dict[nn.Parameter, Tensor] = {}
        self._device = torch.device("cpu")
        self._coming: dict[nn.Parameter, Tensor] | None = None
        self._ready: torch.cuda.Event | None = None
        self._forward, self._apply = block.forward, block._apply
        self.weights = [p for name, p in block.named_parameters() if not is_adapter(name)]
        for weight in self.weights:
            weight.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed then does not broadcast it by NCCL
            self._settle(weight, weight.data)
        block.forward = self.forward
        block._apply = self.apply  # type: ignore[method-assign]
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own, with its weights where its input is."""
        assert not any(w.requires_grad for w in self.weights), "only frozen blocks are swapped"
        device = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).device
        self.fetch(device)
        backward = torch._C._current_graph_task_id() != -1
        neighbour = self.previous if backward else self.next
        if neighbour is not None:
            neighbour.start(device)
        try:
            return self._forward(*args, **kwargs)
        finally:  # checkpointing ends a recomputation by an exception
            self.let_go()

    def start(self, device: torch.device) -> None:
        """Begin to copy the weights to `device`."""
        if self._coming is not None:
            return
        if device.type != "cuda":
            self._coming = {w: home.clone() for w, home in self.homes.items()}
            return
        stream = copy_stream(device)
        with torch.cuda.stream(stream):
            self._coming = {w: home.to(device, non_blocking=True) for w, home in self.homes.items()}
            self._ready = stream.record_event()

    def fetch(self, device: torch.device) -> None:
        """Put the copies in the weights' places."""
        self.start(device)
        assert self._coming is not None
        if self._ready is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(self._ready)
            for value in self._coming.values():
                value.record_stream(current)
        for weight, value in self._coming.items():
            weight.data = value
        self._coming, self._ready = None, None

    def let_go(self) -> None:
        """Put the weights' homes back; the copies go as soon as nothing needs them."""
        for weight, home in self.homes.items():
            weight.data = home

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """In place of `nn.Module._apply`: what moves and casts a model casts these weights, and moves the rest."""
        places = [
            (module._parameters, name, p)
            for module in self.block.modules()
            for name, p in module._parameters.items()
            if p is not None and any(p is w for w in self.weights)
        ]
        for parameters, name, _ in places:
            parameters[name] = None
        try:
            self._apply(fn, recurse)
        finally:
            for parameters, name, weight in places:
                parameters[name] = weight
        for weight in self.weights:
            like = fn(torch.empty(0, dtype=weight.dtype))
            state = getattr(weight, "quant_state", None)  # of NF4: small, and wanted beside the copies
            if state is not None:
                state.to(like.device)
            self._settle(weight, weight.data.to(like.dtype))
        return self.block

    def _settle(self, weight: nn.Parameter, value: Tensor) -> None:
        home = value.to("cpu")
        self.homes[weight] = home.pin_memory() if torch.cuda.is_available() else home
        weight.data = self.homes[weight]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which blocks come to `device`: one for all, so that they come in order."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is a LoRA's own, which trains and stays on the GPU."""
    return "lora_" in name
