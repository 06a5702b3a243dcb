"""Gradient checkpointing of the transformer's blocks, all or every n-th, their inputs on the CPU if asked."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sat_ext.models.levers import GradientCheckpointing


def enable(transformer: Any, options: GradientCheckpointing) -> None:
    """Have `transformer`, of diffusers, recompute blocks in its backward pass as `options` says."""
    blocks: Sequence[nn.Module] = list(transformer.transformer_blocks)
    waiting = WaitingInputs() if options.offload else None
    recomputed = {block for i, block in enumerate(blocks) if i % options.every == 0}

    def run(block: nn.Module, hidden_states: Tensor, *rest: Any) -> Any:
        if block not in recomputed:
            return block(hidden_states, *rest)
        away: AbstractContextManager[Any] = waiting.instead_of(hidden_states) if waiting else nullcontext()
        with away:
            return checkpoint(block.__call__, hidden_states, *rest, use_reentrant=False)

    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=run)


class WaitingInputs:
    """Inputs of blocks that wait for the backward pass in pinned CPU memory.

    They leave on a stream of their own while the block computes, and come back on it one block ahead of their use.
    Without a GPU they are copied at once.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._order: list[weakref.ref[_Away]] = []  # of those that a backward pass still wants

    def instead_of(self, value: Tensor) -> saved_tensors_hooks:
        """Inside, autograd keeps a copy of `value` on the CPU where it would keep `value`."""

        def pack(saved: Tensor) -> Tensor | _Away:
            return self._send(saved) if saved.data_ptr() == value.data_ptr() else saved

        def unpack(saved: Tensor | _Away) -> Tensor:
            return self._bring(saved) if isinstance(saved, _Away) else saved

        return saved_tensors_hooks(pack, unpack)

    def _send(self, value: Tensor) -> _Away:
        if value.is_cuda:
            stream = self._stream = self._stream or torch.cuda.Stream(value.device)
            home = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(value.device))
            with torch.cuda.stream(stream):
                home.copy_(value.detach(), non_blocking=True)
            value.record_stream(stream)  # its memory is not given to others before the copy is made
        else:
            home = value.detach().clone()
        away = _Away(home, value.device)
        self._order = [w for w in self._order if w() is not None]
        self._order.append(weakref.ref(away))
        return away

    def _bring(self, away: _Away) -> Tensor:
        value = away.fetch(self._stream)
        while self._order and (last := self._order.pop()()) is not away:
            if last is not None:  # a pass in another order than backwards: it stays to be fetched
                self._order.append(weakref.ref(last))
                break
        if self._order and (before := self._order[-1]()) is not None:
            before.start(self._stream)
        return value


class _Away:
    """One input on the CPU."""

    def __init__(self, home: Tensor, device: torch.device) -> None:
        self.home, self.device = home, device
        self._back: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def start(self, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy it back."""
        if self._back is None and stream is not None:
            with torch.cuda.stream(stream):
                self._back = self.home.to(self.device, non_blocking=True)
                self._ready = stream.record_event()

    def fetch(self, stream: torch.cuda.Stream | None) -> Tensor:
        """Its value, where it was."""
        if stream is None:
            return self.home
        self.start(stream)
        value, ready, self._back = self._back, self._ready, None
        assert value is not None and ready is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ready)
        value.record_stream(current)
        return value


def options_of(given: bool | GradientCheckpointing) -> GradientCheckpointing | None:
    """What the YAML's `gradient_checkpointing` asks for, None where it is off."""
    if isinstance(given, bool):
        return GradientCheckpointing() if given else None
    return given
