"""CogVideo's `model` section, as the rest of the program asks of it. Imports nothing of CogVideo by itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sat_ext.cogvideo.network import (
    CACHED_TEXT,
    CHUNKED_FIRST_STAGE,
    LOSS,
    model_config,
    params_of,
    read_network,
    sequence_shape,
    target_of,
    text_embedder,
)
from sat_ext.cogvideox import SequenceShape
from sat_ext.models.config import ModelConfig
from sat_ext.types import Bucket

if TYPE_CHECKING:
    from sat_ext.latents.encoders import Encoders, Fingerprints, Part

CHECKOUT = "COGVIDEO_SAT"  # the environment variable that names the `sat` folder of a checkout


class CogVideo:
    """The engine of a CogVideo checkout, whose classes the section names."""

    has_own_script = has_sat_network = samples_on_first_rank = True
    lora_remedy = "append configs/cogvideo/lora-rate.yaml"

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    @property
    def is_conditioned(self) -> bool:
        return read_network(self.model).is_conditioned

    @property
    def condition_dropout(self) -> float:
        """CogVideo's, of whole batches, and that of our loss together."""
        loss = params_of(self.model, "loss_fn_config")
        rates = self.model.get("noised_image_dropout", 0.0), loss.get("condition_dropout", 0.0)
        return 1 - (1 - float(rates[0])) * (1 - float(rates[1]))

    @property
    def weighs_losses(self) -> bool:
        """Ours does, CogVideo's own does not."""
        return target_of(self.model.get("loss_fn_config")) == LOSS

    @property
    def lora_scale(self) -> tuple[float, str] | None:
        network = read_network(self.model)
        alpha, rank = network.lora_alpha, network.lora_rank
        return (alpha / rank, f"{alpha:g}/{rank}") if rank else None

    @property
    def is_2b(self) -> bool:
        network = read_network(self.model)
        return network.text_length is not None and not network.is_rotary

    def doubt(self) -> str | None:
        from sat_ext.cogvideo.check import doubt_of_condition_scale

        return doubt_of_condition_scale(self.model)

    def batch_dtype(self, training: torch.dtype, *, model_parallel: int = 1) -> torch.dtype:
        """The training dtype; its script has the ranks that share a model receive float32, whatever was sent."""
        return training if model_parallel == 1 else torch.float32

    def sequence_shape(self) -> SequenceShape:
        return sequence_shape(read_network(self.model))

    def model_config(self) -> ModelConfig:
        return model_config(self.model)

    @property
    def caches_text(self) -> bool:
        return target_of(text_embedder(self.model)) == CACHED_TEXT

    @property
    def encodes_whole_clips(self) -> bool:
        return target_of(self.model.get("first_stage_config")) != CHUNKED_FIRST_STAGE

    @property
    def recompute(self) -> str:
        params = params_of(self.model, "first_stage_config")
        return str(params.get("recompute", "block"))

    def check(self, buckets: Sequence[Bucket]) -> None:
        from sat_ext.cogvideo.check import check_model

        check_model(self.model, buckets)

    def check_run(self, args: argparse.Namespace, buckets: Sequence[Bucket]) -> None:
        """See `Engine`. It looks at the checkout that is being run too."""
        from sat_ext.cogvideo.check import check_run

        check_run(args, self.model, buckets)

    def check_cache(self, args: argparse.Namespace, *, is_cached: bool) -> None:
        from sat_ext.cogvideo.cached import check_cache

        check_cache(args, self.model, is_cached=is_cached)

    def fingerprints(self, dtype: torch.dtype) -> Fingerprints:
        from sat_ext.cogvideo.cogvideo_encoders import fingerprints

        return fingerprints(self.model, dtype)

    def encoders(self, dtype: torch.dtype, device: torch.device) -> Encoders:
        """See `Engine`. CogVideo's code is that of the checkout which COGVIDEO_SAT names, or of this folder."""
        from sat_ext.cogvideo.cogvideo_encoders import CogVideoEncoders

        sys.path.insert(0, os.environ.get(CHECKOUT) or os.getcwd())
        return CogVideoEncoders(self.model, dtype, device)

    def too_large(self, part: Part) -> str:
        return {
            "text": "append configs/cogvideo/offload-text.yaml, which encodes on the CPU",
            "first_stage": "append configs/cogvideo/joint.yaml, and set model.first_stage_config.params: "
            "{frames: 4, recompute: level}",
        }[part]

    def train_from(self, folder: str, clips: int) -> str:
        return f"append configs/cogvideo/cached.yaml with {folder} as its two folders."
