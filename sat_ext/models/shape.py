"""What a model makes of the buckets: the sequence that a sample becomes, and the shapes that it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sat_ext.cogvideox import LATENT_SIDE, TEXT_TOKENS, SequenceShape
from sat_ext.config import load
from sat_ext.models.config import (
    ModelConfig,
    TransformerConfig,
    check_bucket,
    load_model_config,
    size_multiple,
    text_length,
    transformer_of,
)
from sat_ext.types import Bucket


def check_buckets(model: Mapping[str, Any], buckets: Sequence[Bucket]) -> None:
    """Raise `ConfigError` for a shape that our engine's model cannot take; `model` is its section, or empty."""
    if model:
        config = expected_config(model)
        for bucket in buckets:
            check_bucket(config, bucket)


def sequence_shape(model: Mapping[str, Any]) -> SequenceShape:
    """What the cost of a batch follows from; `model` is the YAML's section: ours, CogVideo's, or empty."""
    if "network_config" in model:
        return _of_cogvideo(model["network_config"].get("params") or {})
    if not model:
        return SequenceShape()
    config = expected_config(model)
    transformer = transformer_of(config)
    return SequenceShape(
        hidden_size=transformer.num_attention_heads * transformer.attention_head_dim,
        text_length=text_length(config),
        pixels_per_token=size_multiple(config),
        latents_per_token=transformer.patch_size_t or 1,
    )


def _of_cogvideo(network: Mapping[str, Any]) -> SequenceShape:
    """`patch_size` of CogVideo's network is a side in CogVideoX 1.0, and (frames, rows, columns) in 1.5."""
    patch = network.get("patch_size", 2)
    frames, side = (1, patch) if isinstance(patch, int) else (patch[0], patch[1])
    position = (network.get("modules") or {}).get("pos_embed_config") or {}
    return SequenceShape(
        hidden_size=int(network["hidden_size"]),
        text_length=(position.get("params") or {}).get("text_length", TEXT_TOKENS),
        pixels_per_token=LATENT_SIDE * side,
        latents_per_token=frames,
    )


def expected_config(model: Mapping[str, Any]) -> ModelConfig:
    """The model's sizes; where its folder is not on this machine, those that the YAML expects of it."""
    config = load(ModelConfig, model, "model")
    if config.pretrained is None or Path(config.pretrained).is_dir():
        return load_model_config(model)
    return replace(config, transformer=config.transformer or TransformerConfig())
