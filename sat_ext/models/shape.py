"""The sizes of the built-in engine's model, whether or not its folder is on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sat_ext.config import load
from sat_ext.models.config import ModelConfig, TransformerConfig, load_model_config


def expected_config(model: Mapping[str, Any]) -> ModelConfig:
    """The model's sizes; where its folder is not on this machine, those that the YAML expects of it."""
    config = load(ModelConfig, model, "model")
    if config.pretrained is None or Path(config.pretrained).is_dir():
        return load_model_config(model)
    return replace(config, transformer=config.transformer or TransformerConfig())
