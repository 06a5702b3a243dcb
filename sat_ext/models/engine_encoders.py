"""The built-in engine's encoders, for `sat-ext cache`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.latents.checksummed import files_fingerprint
from sat_ext.latents.encoders import Encoders, Fingerprints, Part
from sat_ext.latents.store import fingerprint_of
from sat_ext.latents.text import encoder_fingerprint
from sat_ext.models.first_stage import build_first_stage
from sat_ext.models.folder import load_model_config
from sat_ext.models.t5 import build_text


class EngineEncoders(Encoders):
    """Those of a `model:` section."""

    def __init__(self, model: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.config = config = load_model_config(model)
        super().__init__(dtype, device, conditions=config.conditioning == "i2v")

    def build(self, part: Part) -> nn.Module:
        return (build_text if part == "text" else build_first_stage)(self.config, self.dtype)

    def embed(self, captions: list[str]) -> Tensor:
        return self.text.encode(captions, self.device, self.dtype)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.first_stage.moments(pixels)

    def encode_condition(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.first_stage.encode_condition(frames, generator)


def fingerprints(model: Mapping[str, Any], dtype: torch.dtype) -> Fingerprints:
    """Of a `model:` section, without loading a weight."""
    config = load_model_config(model)
    name = str(dtype).removeprefix("torch.")
    first = config.first_stage
    if first.kind == "cosine":
        stage = fingerprint_of("cosine", name)
    else:
        weights = files_fingerprint(Path(config.pretrained, "vae")) if config.pretrained else "random"
        options = (asdict(first.autoencoder), first.tiling, first.frames, first.condition_scale)
        stage = fingerprint_of("autoencoder", weights, options, name, config.conditioning)
    if config.text.kind == "byt5":
        text = {"encoder": "byt5", "width": str(config.transformer.text_embed_dim), "dtype": name}
        return Fingerprints(first_stage=stage, text={**text, "max_length": str(config.text_length)})
    text = encoder_fingerprint(f"{config.pretrained}/text_encoder", config.text_length, dtype)
    return Fingerprints(first_stage=stage, text={**text, "quantization": config.text.quantization})
