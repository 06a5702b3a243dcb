"""A run's first stage and text encoder as `sat-ext cache` uses them: the base of each engine's class."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sat_ext.models.conditioning import noisy_first_frames
from sat_ext.pixels import to_model_range

Part = Literal["text", "first_stage"]


@dataclass(frozen=True, kw_only=True)
class Fingerprints:
    """Hashes that change with the encoders: of latents, and of text embeddings (`encoder_fingerprint`)."""

    first_stage: str
    text: Mapping[str, str]


class Encoders(ABC):
    """Pixels are (B, T, 3, H, W) in uint8, latents (B, t, C, h, w) in the training dtype, on the CPU.

    Outside `holding` nothing is loaded, and inside it only one part, as a small GPU cannot hold both.
    `conditions`: the model is image-to-video.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, *, conditions: bool) -> None:
        self.dtype, self.device, self.conditions = dtype, device, conditions
        self.text: Any = None
        self.first_stage: Any = None

    @contextmanager
    def holding(self, part: Part) -> Iterator[None]:
        """Inside, this part is loaded: "text" for `embed`, "first_stage" for the others."""
        setattr(self, part, self.build(part).to(self.device))
        try:
            yield
        finally:
            setattr(self, part, None)
            gc.collect()  # modules refer to themselves: their memory would not be free for the next part
            torch.cuda.empty_cache()

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of the posterior, as the engine takes them; None where nothing is drawn."""
        mean, deviation = self.posterior(self._in_range(pixels))
        return mean.cpu(), None if deviation is None else deviation.cpu()

    @torch.no_grad()
    def condition(self, pixels: Tensor, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Of the first frames: the clean latent (B, 1, C, h, w), and `count` noisy ones (B, count, 1, C, h, w).

        They are as in a training step: noise on the frame, and a draw from its posterior.
        """
        frames = self._in_range(pixels[:, :1])
        noisy = [self.encode_condition(noisy_first_frames(frames, generator), generator) for _ in range(count)]
        return self.encode_condition(frames).cpu(), torch.stack(noisy, dim=1).cpu()

    @abstractmethod
    def build(self, part: Part) -> Any:
        """The module of this part, with its weights."""

    @abstractmethod
    def embed(self, captions: list[str]) -> Tensor:
        """(B, tokens, width), by the text encoder that is loaded."""

    @abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation of pixels in [-1, 1]."""

    @abstractmethod
    def encode_condition(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latent of condition frames in [-1, 1]: drawn with a generator, the posterior's mode without."""

    def _in_range(self, pixels: Tensor) -> Tensor:
        return to_model_range(pixels.to(self.device), self.dtype)
