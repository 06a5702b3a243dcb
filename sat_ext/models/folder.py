"""A `model:` section together with the pretrained folder that it names, whose architecture is the model's."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sat_ext.config import load
from sat_ext.errors import ConfigError
from sat_ext.models.config import (
    AutoencoderConfig,
    ModelConfig,
    TransformerConfig,
    latent_channels,
    transformer_of,
)
from sat_ext.models.levers import check_levers


def load_model_config(mapping: Mapping[str, Any], where: str = "model") -> ModelConfig:
    """The `model:` mapping as a `ModelConfig` whose `transformer` is complete and agrees with the folder.

    Raises `ConfigError` for unknown keys, for a folder that is missing or incomplete, for a folder that holds
    another architecture than the YAML says, and for channel counts that do not fit together.
    """
    config = load(ModelConfig, mapping, where)
    if config.pretrained is not None:
        config = _with_folder(config, where)
    elif config.transformer is None:
        config = replace(config, transformer=TransformerConfig())
    _check_channels(config, where)
    check_levers(config, transformer_of(config).num_layers)
    return config


def expected_config(model: Mapping[str, Any]) -> ModelConfig:
    """The model's sizes; where its folder is not on this machine, those that the YAML expects of it."""
    config = load(ModelConfig, model, "model")
    if config.pretrained is None or Path(config.pretrained).is_dir():
        return load_model_config(model)
    return replace(config, transformer=config.transformer or TransformerConfig())


def folder_config(pretrained: str, subfolder: str, name: str = "config.json") -> dict[str, Any]:
    """`<pretrained>/<subfolder>/<name>` as a dict; `ConfigError` where the folder or the file is missing."""
    root = Path(pretrained)
    if not root.is_dir():
        raise ConfigError(f"model.pretrained: no folder {pretrained}; give the path of a diffusers model.")
    file = root / subfolder / name
    if not file.is_file():
        raise ConfigError(
            f"model.pretrained: {pretrained} has no {subfolder}/{name}; "
            "a diffusers model has transformer/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return loaded


def _with_folder(config: ModelConfig, where: str) -> ModelConfig:
    assert config.pretrained is not None
    if config.first_stage.kind != "autoencoder" or config.text.kind != "t5":
        raise ConfigError(
            f"{where}.pretrained: the folder brings an autoencoder and a T5 encoder, but the YAML asks for "
            f"first_stage.kind '{config.first_stage.kind}' and text.kind '{config.text.kind}'; remove these."
        )
    found = _architecture(TransformerConfig, folder_config(config.pretrained, "transformer"))
    if config.transformer is not None:
        for key, expected in asdict(config.transformer).items():
            if not key.startswith("sample_") and getattr(found, key) != expected:
                raise ConfigError(
                    f"{where}.pretrained: {config.pretrained} has {key} {getattr(found, key)}, but "
                    f"{where}.transformer.{key} is {expected}; use the YAML of the model in that folder."
                )
    autoencoder = _architecture(AutoencoderConfig, folder_config(config.pretrained, "vae"))
    return replace(config, transformer=found, first_stage=replace(config.first_stage, autoencoder=autoencoder))


def _architecture(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """The dataclass `cls` of those of `values` (a config.json) that it has fields for."""
    kept = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    return load(cls, kept, "config.json")


def _check_channels(config: ModelConfig, where: str) -> None:
    transformer = transformer_of(config)
    latent = latent_channels(config)
    expected = latent * (2 if config.conditioning == "i2v" else 1)
    if (transformer.in_channels, transformer.out_channels) != (expected, latent):
        raise ConfigError(
            f"{where}.transformer: in_channels {transformer.in_channels} and out_channels "
            f"{transformer.out_channels} do not fit conditioning '{config.conditioning}' with {latent} "
            f"latent channels; it takes {expected} and {latent}."
        )
