"""CogVideo's own first stage and text encoder, as its YAML names them, for `sat-ext cache`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.cogvideo.network import (
    CACHED_FIRST_STAGE,
    CACHED_TEXT,
    Component,
    component_of,
    text_embedder,
)
from sat_ext.cogvideo.target import import_class
from sat_ext.errors import ConfigError
from sat_ext.latents.checksummed import files_fingerprint
from sat_ext.latents.encoders import Encoders, Fingerprints, Part
from sat_ext.latents.store import fingerprint_of
from sat_ext.latents.text import encoder_fingerprint

ARCHITECTURE = ("encoder_config", "regularizer_config")  # the first stage's parameters that latents follow from


class CogVideoEncoders(Encoders):
    """Those of CogVideo's `model` section; its code must be importable.

    Latents of clips are the first stage's own, which the engine scales. Conditions are at `scale_factor`, as the
    engine makes them, and `JointDiffusionLoss` brings them to its `condition_scale`: one cache serves all values.
    """

    def __init__(self, model: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        text, stage = text_embedder(model), component_of(model, "first_stage_config")
        if text.target == CACHED_TEXT or stage.target == CACHED_FIRST_STAGE:
            raise ConfigError(
                "model: the YAML files train from a cache, and writing one needs the encoders; leave "
                "configs/cogvideo/cached.yaml out, and name the folder with -o."
            )
        self.scale = float(model["scale_factor"])
        self.components: dict[Part, tuple[Component, str]] = {
            "text": (text, "model.conditioner_config.params.emb_models"),
            "first_stage": (stage, "model.first_stage_config"),
        }
        super().__init__(dtype, device, conditions=bool(model.get("noised_image_input")))

    def build(self, part: Part) -> nn.Module:
        component, where = self.components[part]
        module: nn.Module = import_class(component.target, f"{where}.target")(**component.params)
        return module.to(dtype=self.dtype).eval()

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Tensor:
        embedded: Tensor = self.text(captions)
        return embedded.to(self.dtype)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        given = self.first_stage.encode(pixels.transpose(1, 2).contiguous(), unregularized=True)
        moments = given[0] if isinstance(given, tuple) else given
        mean, log_variance = moments.transpose(1, 2).chunk(2, dim=2)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # the bounds of sgm's Gaussian posterior

    def encode_condition(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, deviation = self.posterior(frames)
        if generator is None:
            return self.scale * mean
        noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        return (self.scale * (mean.float() + deviation.float() * noise)).to(self.dtype)


def fingerprints(model: Mapping[str, Any], dtype: torch.dtype) -> Fingerprints:
    """Of CogVideo's `model` section, without loading a weight."""
    params, text = component_of(model, "first_stage_config").params, text_embedder(model).params
    checkpoint, length = params.get("ckpt_path"), text.get("max_length")
    weights = files_fingerprint(Path(checkpoint)) if checkpoint else "random"
    architecture = {name: params[name] for name in ARCHITECTURE if name in params}
    name = str(dtype).removeprefix("torch.")
    return Fingerprints(
        first_stage=fingerprint_of("cogvideo", weights, architecture, model.get("scale_factor"), name),
        text=encoder_fingerprint(text.get("model_dir"), None if length is None else int(length), dtype),
    )
