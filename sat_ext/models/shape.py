"""What a model makes of the buckets: the sequence that a sample becomes, and the shapes that it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sat_ext.config import load
from sat_ext.data.buckets import SequenceShape
from sat_ext.errors import ConfigError
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
    """Raise `ConfigError` for a shape that the model cannot take, or must not.

    `model` is the YAML's section: ours, CogVideo's, or empty.
    """
    if "network_config" in model:  # CogVideo's own engine
        if model.get("noised_image_input") and any(b.frames == 1 for b in buckets):
            raise ConfigError(
                "data.params.buckets.frames: CogVideo's own image-to-video engine would show a still its target "
                "as the condition; leave 1 out of the list, or train its text-to-video model, or our engine."
            )
    elif model:
        config = _architecture(model)
        for bucket in buckets:
            check_bucket(config, bucket)


def sequence_shape(model: Mapping[str, Any]) -> SequenceShape:
    """What the cost of a batch follows from; `model` is the YAML's section: ours, CogVideo's, or empty."""
    if "network_config" in model:
        return SequenceShape(hidden_size=int(model["network_config"]["params"]["hidden_size"]))
    if not model:
        return SequenceShape()
    config = _architecture(model)
    transformer = transformer_of(config)
    return SequenceShape(
        hidden_size=transformer.num_attention_heads * transformer.attention_head_dim,
        text_length=text_length(config),
        pixels_per_token=size_multiple(config),
        latents_per_token=transformer.patch_size_t or 1,
    )


def _architecture(model: Mapping[str, Any]) -> ModelConfig:
    """The model's sizes; where its folder is not on this machine, those that the YAML expects of it."""
    config = load(ModelConfig, model, "model")
    if config.pretrained is None or Path(config.pretrained).is_dir():
        return load_model_config(model)
    return replace(config, transformer=config.transformer or TransformerConfig())
