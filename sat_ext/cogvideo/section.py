"""CogVideo's `model` section, as the rest of the program asks of it. Imports nothing of CogVideo by itself."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sat_ext.cogvideo.check import check_cache, check_model, check_run
from sat_ext.cogvideo.cogvideo_encoders import CogVideoEncoders, fingerprints
from sat_ext.cogvideo.network import (
    CACHED_TEXT,
    CHUNKED_FIRST_STAGE,
    LOSS,
    component_of,
    given_in,
    model_config,
    read_network,
    text_embedder,
)
from sat_ext.cogvideox import LATENT_SIDE, SCALE_FACTOR, TEXT_TOKENS, SequenceShape
from sat_ext.errors import ConfigError
from sat_ext.latents.encoders import Encoders, Fingerprints, Part
from sat_ext.models.config import ModelConfig
from sat_ext.types import Bucket

CHECKOUT = "COGVIDEO_SAT"  # the environment variable that names the `sat` folder of a checkout


class CogVideo:
    """The engine of a CogVideo checkout, whose classes the section names."""

    is_cogvideo = True
    takes_packs = False
    lora_remedy = "append configs/cogvideo/lora-rate.yaml"

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    @property
    def is_conditioned(self) -> bool:
        return read_network(self.model).is_conditioned

    @property
    def condition_dropout(self) -> float:
        # CogVideo draws once for a batch, and our loss once more for each sample
        of_batch = float(self.model.get("noised_image_dropout", 0.0))
        of_sample = float(component_of(self.model, "loss_fn_config").params.get("condition_dropout", 0.0))
        return 1 - (1 - of_batch) * (1 - of_sample)

    @property
    def weighs_losses(self) -> bool:
        return component_of(self.model, "loss_fn_config").target == LOSS

    @property
    def lora_scale(self) -> tuple[float, str] | None:
        network = read_network(self.model)
        alpha, rank = network.lora_alpha, network.lora_rank
        return (alpha / rank, f"{alpha:g}/{rank}") if rank else None

    def check_base(self) -> None:
        network = read_network(self.model)
        if network.lora_rank is None:
            raise ConfigError(
                "model.network_config.params.modules: no lora_config, but a source of data.params.sources has the "
                "target base, which is what the model predicts without its LoRA; append "
                "configs/cogvideo/lora.yaml, or take the target out."
            )
        if not self.weighs_losses:
            raise ConfigError(
                "model.loss_fn_config.target: CogVideo's own loss knows no target base, which a source of "
                f"data.params.sources has; name {LOSS}, or take the target out."
            )

    @property
    def is_2b(self) -> bool:
        network = read_network(self.model)
        return network.text_length is not None and not network.is_rotary

    def doubt(self) -> str | None:
        network, loss = read_network(self.model), component_of(self.model, "loss_fn_config")
        has_scale = loss.target != LOSS or loss.params.get("condition_scale") is not None
        if has_scale or network.generation != "1.5" or not network.is_conditioned:
            return None
        return (
            f"model.loss_fn_config.params.condition_scale: missing, so the condition trains at scale_factor "
            f"({SCALE_FACTOR}), which no sampler of CogVideoX 1.5 uses; append configs/cogvideo/1.5.yaml (1.0, "
            "for sample_video.py)."
        )

    def batch_dtype(self, training: torch.dtype, *, model_parallel: int = 1) -> torch.dtype:
        # `broad_cast_batch` of its script has ranks that share a model receive float32, whatever was sent
        return training if model_parallel == 1 else torch.float32

    def sequence_shape(self) -> SequenceShape:
        network = read_network(self.model)
        return SequenceShape(
            hidden_size=given_in(network, "model", "hidden_size"),
            text_length=network.text_length or TEXT_TOKENS,
            pixels_per_token=LATENT_SIDE * network.patch[1],
            latents_per_token=network.patch[0],
        )

    def model_config(self) -> ModelConfig:
        return model_config(self.model)

    @property
    def caches_text(self) -> bool:
        return text_embedder(self.model).target == CACHED_TEXT

    @property
    def tokenizer(self) -> str | None:
        return text_embedder(self.model).params.get("model_dir")

    @property
    def encodes_whole_clips(self) -> bool:
        return component_of(self.model, "first_stage_config").target != CHUNKED_FIRST_STAGE

    @property
    def recompute(self) -> str:
        return str(component_of(self.model, "first_stage_config").params.get("recompute", "block"))

    def check(self, buckets: Sequence[Bucket]) -> None:
        check_model(self.model, buckets)

    def check_run(self, args: argparse.Namespace, buckets: Sequence[Bucket], *, is_cached: bool) -> None:
        check_run(args, self.model, buckets)
        check_cache(args, self.model, is_cached=is_cached)

    def fingerprints(self, dtype: torch.dtype) -> Fingerprints:
        return fingerprints(self.model, dtype)

    def encoders(self, dtype: torch.dtype, device: torch.device) -> Encoders:
        # CogVideo is no package: its modules are found from its `sat` folder, as beside its own script
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
