"""The built-in engine's encoders: for `sat-ext cache`, for training, and for training from a cache."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.latents.checksummed import files_fingerprint
from sat_ext.latents.encoders import Encoders, Fingerprints, LatentShape, Part
from sat_ext.latents.store import fingerprint_of
from sat_ext.latents.text import TextEmbeddings, encoder_fingerprint
from sat_ext.models.config import ModelConfig
from sat_ext.models.first_stage import build_first_stage
from sat_ext.models.folder import load_model_config
from sat_ext.models.t5 import build_text


class EngineEncoders(Encoders):
    """Those of a `model:` section."""

    def __init__(self, model: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.config = config = load_model_config(model)
        shape = LatentShape(
            channels=config.latent_channels,
            side=config.spatial_compression,
            item=dtype.itemsize,
            deviates=config.first_stage.kind == "autoencoder",
            conditions=config.conditioning == "i2v",
            text=(config.text_length, config.transformer.text_embed_dim),
        )
        super().__init__(dtype, device, shape)

    def build(self, part: Part) -> nn.Module:
        return (build_text if part == "text" else build_first_stage)(self.config, self.dtype)

    def embed(self, captions: list[str]) -> Tensor:
        embedded: Tensor = self.text.encode(captions, self.device, self.dtype)
        return embedded

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        moments: tuple[Tensor, Tensor | None] = self.first_stage.moments(pixels)
        return moments

    def encode_condition(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        latents: Tensor = self.first_stage.encode_condition(frames, generator)
        return latents


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


class CachedText(nn.Module):
    """In the place of a text encoder: embeddings of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(folder)

    def encode(self, captions: list[str], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Embeddings, (B, length, D). Raises `DataError` for a caption that is not in the folder."""
        return torch.stack([self.embeddings[caption] for caption in captions]).to(device, dtype)


def build_encoders(config: ModelConfig, dtype: torch.dtype, folder: str | None) -> tuple[Any, Any]:
    """First stage and text encoder of an engine. With the `folder` of a cache there is no first stage."""
    if folder is not None:
        return None, CachedText(Path(folder))
    return build_first_stage(config, dtype), build_text(config, dtype)
