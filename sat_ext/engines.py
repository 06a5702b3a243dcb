"""The engines that a `model` section can name, and what the rest of the program asks of them.

| engine | section | class | trained by |
|---|---|---|---|
| built-in | keys of `ModelConfig` | `models.section.BuiltIn` | this repository's train_video.py |
| CogVideo's | `network_config` ... | `cogvideo.section.CogVideo` | the train_video.py of a CogVideo checkout |

Only `engine_of` tells them apart. A third engine would be one more class with the members of `Engine`.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from sat_ext.cogvideo.section import CogVideo
from sat_ext.cogvideox import SequenceShape
from sat_ext.config import plain
from sat_ext.errors import ConfigError
from sat_ext.latents.encoders import Encoders, Fingerprints, Part
from sat_ext.models.config import ModelConfig
from sat_ext.models.section import BuiltIn
from sat_ext.types import Bucket


class Engine(Protocol):
    """One engine with its `model` section, which may be empty: then nothing is known of the model."""

    model: Mapping[str, Any]

    @property
    def has_own_script(self) -> bool:
        """Whether the train_video.py of a CogVideo checkout trains it, with arguments that are not ours."""

    @property
    def has_sat_network(self) -> bool:
        """Whether its network is CogVideo's, built of SAT's layers and described by `network_config`."""

    @property
    def samples_on_first_rank(self) -> bool:
        """Whether the first rank alone generates samples in an evaluation."""

    @property
    def is_conditioned(self) -> bool:
        """Whether the model is image-to-video."""

    @property
    def condition_dropout(self) -> float:
        """How often an image-to-video model trains without its condition, 0 to 1."""

    @property
    def takes_packs(self) -> bool:
        """Whether a step can have samples of several shapes."""

    @property
    def weighs_losses(self) -> bool:
        """Whether the loss multiplies by the batches' `loss_weight`."""

    @property
    def lora_scale(self) -> tuple[float, str] | None:
        """The factor on the product of a LoRA's two matrices, and how it is written; None where no LoRA trains."""

    @property
    def lora_remedy(self) -> str:
        """What gives a LoRA a learning rate that fits."""

    @property
    def is_2b(self) -> bool:
        """Whether the model is CogVideoX-2B, the one without rotary positions."""

    def doubt(self) -> str | None:
        """What of the section trains without an error, but hardly as it is meant, in a sentence."""

    def batch_dtype(self, training: torch.dtype, *, model_parallel: int = 1) -> torch.dtype:
        """What the pixels of a batch are handed over in, where the run trains in `training`."""

    def sequence_shape(self) -> SequenceShape:
        """What the cost of a batch follows from."""

    def model_config(self) -> ModelConfig:
        """The model, in the built-in engine's words. Its folder need not be on this machine."""

    @property
    def caches_text(self) -> bool:
        """Whether the section takes text embeddings from a folder."""

    @property
    def tokenizer(self) -> str | None:
        """The folder of the text encoder's tokenizer, or "byt5"; None where the section names none."""

    @property
    def encodes_whole_clips(self) -> bool:
        """Whether the first stage holds an activation of a clip at full resolution."""

    @property
    def recompute(self) -> str:
        """What the first stage computes again in its backward pass, in the words of `ChunkedFirstStage`."""

    def check(self, buckets: Sequence[Bucket]) -> None:
        """Raise `ConfigError` where the model cannot train on samples of these shapes."""

    def check_run(self, args: argparse.Namespace, buckets: Sequence[Bucket], *, is_cached: bool) -> None:
        """`check`, and what only a run with SAT's arguments, or one from a cache, can get wrong."""

    def fingerprints(self, dtype: torch.dtype) -> Fingerprints:
        """Of the first stage and the text encoder, without loading a weight. Raises `ConfigError`."""

    def encoders(self, dtype: torch.dtype, device: torch.device) -> Encoders:
        """The first stage and the text encoder, for `sat-ext cache`. Raises `ConfigError`."""

    def too_large(self, part: Part) -> str:
        """What to do where a GPU is too small for one of the encoders."""

    def train_from(self, folder: str, clips: int) -> str:
        """How to train from a cache in `folder` that has `clips` draws of each clip."""


def engine_of(model: Any) -> Engine:
    """The engine of a `model` section: a mapping, OmegaConf's too, which may be empty or None.

    Raises `ConfigError` for anything else.
    """
    if not isinstance(model or {}, Mapping):
        raise ConfigError(f"model: expected a mapping of keys, got {model!r}.")
    section = plain(model)
    return CogVideo(section) if "network_config" in section else BuiltIn(section)
