"""The built-in engine's `model` section, as `Engine` and `Encoders` ask of it. Only `build` imports diffusers."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.cogvideox import SequenceShape
from sat_ext.errors import ConfigError
from sat_ext.latents.checksummed import files_fingerprint
from sat_ext.latents.encoders import Encoders, Fingerprints, Part
from sat_ext.latents.store import fingerprint_of
from sat_ext.latents.text import encoder_fingerprint
from sat_ext.models.config import ModelConfig, TrainConfig, check_bucket
from sat_ext.models.folder import expected_config, load_model_config
from sat_ext.types import Bucket


class BuiltIn:
    """This package's engine, on diffusers' CogVideoX modules."""

    is_cogvideo = False
    lora_remedy = "use configs/train/lora.yaml"
    weighs_losses = True
    caches_text = encodes_whole_clips = False
    recompute = "block"

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    @property
    def takes_packs(self) -> bool:
        return bool(self.model)  # a run without the section has an engine of the user's own

    @property
    def is_conditioned(self) -> bool:
        return self.model.get("conditioning") == "i2v"

    @property
    def condition_dropout(self) -> float:
        return float(self.model.get("condition_dropout", ModelConfig.condition_dropout))

    @property
    def lora_scale(self) -> tuple[float, str] | None:
        train = self.model.get("train") or {}
        alpha, rank = train.get("alpha", TrainConfig.alpha), train.get("rank", TrainConfig.rank)
        if train.get("mode") != "lora" or not rank:
            return None
        if train.get("rslora"):
            return alpha / math.sqrt(rank), f"{alpha}/sqrt({rank})"
        return alpha / rank, f"{alpha}/{rank}"

    def check_base(self) -> None:
        if (self.model.get("train") or {}).get("mode") != "lora":
            raise ConfigError(
                "model.train.mode: full, but a source of data.params.sources has the target base, which is what "
                "the model predicts without its LoRA; append configs/train/lora.yaml, or take the target out."
            )

    @property
    def is_2b(self) -> bool:
        transformer = self.model.get("transformer") or {}
        rotary = transformer.get("use_rotary_positional_embeddings", False)
        return bool(self.model.get("pretrained") and transformer and not rotary)

    @property
    def tokenizer(self) -> str | None:
        if (self.model.get("text") or {}).get("kind") == "byt5":
            return "byt5"
        folder = self.model.get("pretrained")
        return f"{folder}/tokenizer" if folder else None

    def doubt(self) -> str | None:
        return None

    def batch_dtype(self, training: torch.dtype, *, model_parallel: int = 1) -> torch.dtype:
        if self.model:
            return torch.uint8  # a fourth of the bytes from the data workers to the GPU, where the engine converts
        return training if model_parallel == 1 else torch.float32  # as CogVideo's: the engine is not known

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
        if self.model:
            config = expected_config(self.model)
            for bucket in buckets:
                check_bucket(config, bucket)

    def check_run(self, args: argparse.Namespace, buckets: Sequence[Bucket], *, is_cached: bool) -> None:
        self.check(buckets)  # arguments are checked when they are parsed, a cache when it is opened

    def fingerprints(self, dtype: torch.dtype) -> Fingerprints:
        if not self.model:
            raise ConfigError("--base: no 'model' section to take encoders from; add a file of configs/model/.")
        config, name = load_model_config(self.model), str(dtype).removeprefix("torch.")
        first, text, length = config.first_stage, config.text, config.text_length
        if first.kind == "cosine":
            stage = fingerprint_of("cosine", name)
        else:
            weights = files_fingerprint(Path(config.pretrained, "vae")) if config.pretrained else "random"
            options = (asdict(first.autoencoder), first.tiling, first.frames, first.condition_scale)
            stage = fingerprint_of("autoencoder", weights, options, name, config.conditioning)
        if text.kind == "byt5":
            width = str(config.transformer.text_embed_dim)
            encoder = {"encoder": "byt5", "width": width, "dtype": name, "max_length": str(length)}
        else:
            encoder = encoder_fingerprint(f"{config.pretrained}/text_encoder", length, dtype)
            encoder["quantization"] = text.quantization
        return Fingerprints(first_stage=stage, text=encoder)

    def encoders(self, dtype: torch.dtype, device: torch.device) -> Encoders:
        return EngineEncoders(self.model, dtype, device)

    def too_large(self, part: Part) -> str:
        return {
            "text": "set model.text.quantization: nf4, or model.text.device: cpu, which is slower",
            "first_stage": "set model.first_stage.tiling: true, for the training run too: latents change a little",
        }[part]

    def train_from(self, folder: str, clips: int) -> str:
        extra = f", clips: {clips}" if clips > 1 else ""
        return f"append a YAML: data: {{params: {{cache: {{folder: {folder}{extra}}}}}}}"


class EngineEncoders(Encoders):
    """Those of a `model:` section."""

    def __init__(self, model: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.config = load_model_config(model)
        super().__init__(dtype, device, conditions=self.config.conditioning == "i2v")

    def build(self, part: Part) -> nn.Module:
        from sat_ext.models.first_stage import build_first_stage
        from sat_ext.models.t5 import build_text

        return (build_text if part == "text" else build_first_stage)(self.config, self.dtype)

    def embed(self, captions: list[str]) -> Tensor:
        return self.text.encode(captions, self.device, self.dtype)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.first_stage.moments(pixels)

    def encode_condition(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.first_stage.encode_condition(frames, generator)
