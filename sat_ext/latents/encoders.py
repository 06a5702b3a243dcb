"""What `sat-ext cache` asks of a run's encoders, the built-in engine's or CogVideo's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Part = Literal["text", "first_stage"]


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """What tells a run's latents and its text embeddings (`encoder_fingerprint`) from those of other encoders."""

    first_stage: str
    text: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """For the room that they take: `channels` of a latent, its `side` in pixels, bytes of a number, whether a
    deviation is kept beside the mean, whether clips have a condition, and (tokens, width) of a caption.
    """

    channels: int
    side: int
    item: int
    deviates: bool
    conditions: bool
    text: tuple[int, int]


class Encoders(Protocol):
    """Pixels are (B, T, 3, H, W) in uint8, latents (B, t, C, h, w) in the training dtype, on the CPU.

    Nothing is loaded outside `holding`, and inside it one part alone: the GPUs that need a cache cannot hold both.
    """

    shape: LatentShape

    def holding(self, part: Part) -> AbstractContextManager[None]:
        """Inside, this part is loaded: "text" for `embed`, "first_stage" for the others."""

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the posterior, as the engine takes them; None where nothing is drawn."""

    def condition(self, pixels: Tensor, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Of the first frames: the clean latent (B, 1, C, h, w), and `count` noisy ones (B, count, 1, C, h, w)."""

    def embed(self, captions: list[str]) -> Tensor:
        """(B, tokens, width)."""


@contextmanager
def loaded(owner: Any, part: Part, build: Callable[[], Any]) -> Iterator[None]:
    """Inside, `owner` has what `build` gives as its attribute `part`; after it, None, and its memory is free."""
    setattr(owner, part, build())
    try:
        yield
    finally:
        setattr(owner, part, None)
        gc.collect()  # modules refer to themselves: without it their memory would still be there for the next part
        torch.cuda.empty_cache()
