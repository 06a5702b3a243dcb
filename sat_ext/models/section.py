"""The built-in engine's `model` section, as the rest of the program asks of it. Imports no diffusers by itself."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sat_ext.cogvideox import SequenceShape
from sat_ext.config import load
from sat_ext.errors import ConfigError
from sat_ext.models.config import ModelConfig, TrainConfig, check_bucket
from sat_ext.models.folder import expected_config
from sat_ext.types import Bucket

if TYPE_CHECKING:
    from sat_ext.latents.encoders import Encoders, Fingerprints, Part


class BuiltIn:
    """This package's engine, on diffusers' CogVideoX modules."""

    has_own_script = has_sat_network = samples_on_first_rank = False
    lora_remedy = "use configs/train/lora.yaml"
    weighs_losses = True
    caches_text = encodes_whole_clips = False
    recompute = "block"

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    @property
    def is_conditioned(self) -> bool:
        return self.model.get("conditioning") == "i2v"

    @property
    def condition_dropout(self) -> float:
        return load(ModelConfig, self.model, "model").condition_dropout if self.model else 0.0

    @property
    def lora_scale(self) -> tuple[float, str] | None:
        train = self.model.get("train") or {}
        alpha, rank = train.get("alpha", TrainConfig.alpha), train.get("rank", TrainConfig.rank)
        return (alpha / rank, f"{alpha}/{rank}") if train.get("mode") == "lora" and rank else None

    @property
    def is_2b(self) -> bool:
        transformer = self.model.get("transformer") or {}
        rotary = transformer.get("use_rotary_positional_embeddings", False)
        return bool(self.model.get("pretrained") and transformer and not rotary)

    def doubt(self) -> str | None:
        return None

    def batch_dtype(self, training: torch.dtype, *, model_parallel: int = 1) -> torch.dtype:
        """uint8, which the engine converts on its device; the training dtype for an engine that is not known."""
        if self.model:
            return torch.uint8
        return training if model_parallel == 1 else torch.float32

    def sequence_shape(self) -> SequenceShape:
        if not self.model:
            return SequenceShape()
        config = expected_config(self.model)
        transformer = config.transformer
        return SequenceShape(
            hidden_size=transformer.num_attention_heads * transformer.attention_head_dim,
            text_length=config.text_length,
            pixels_per_token=config.size_multiple,
            latents_per_token=transformer.patch_size_t or 1,
        )

    def model_config(self) -> ModelConfig:
        return expected_config(self.model)

    def check(self, buckets: Sequence[Bucket]) -> None:
        if not self.model:
            return
        config = expected_config(self.model)
        for bucket in buckets:
            check_bucket(config, bucket)

    def check_run(self, args: argparse.Namespace, buckets: Sequence[Bucket], *, is_cached: bool) -> None:
        self.check(buckets)  # its arguments were checked when they were parsed, and any cache of its encoders goes

    def fingerprints(self, dtype: torch.dtype) -> Fingerprints:
        if not self.model:
            raise ConfigError("--base: no 'model' section to take encoders from; add a file of configs/model/.")
        from sat_ext.models.engine_encoders import fingerprints  # and diffusers

        return fingerprints(self.model, dtype)

    def encoders(self, dtype: torch.dtype, device: torch.device) -> Encoders:
        from sat_ext.models.engine_encoders import EngineEncoders

        return EngineEncoders(self.model, dtype, device)

    def too_large(self, part: Part) -> str:
        return {
            "text": "set model.text.quantization: nf4, or model.text.device: cpu, which is slower",
            "first_stage": "set model.first_stage.tiling: true, for the training run too: latents change a little",
        }[part]

    def train_from(self, folder: str, clips: int) -> str:
        extra = f", clips: {clips}" if clips > 1 else ""
        return f"append a YAML: data: {{params: {{cache: {{folder: {folder}{extra}}}}}}}"
