"""A `model:` section together with the pretrained folder that it names, whose architecture is the model's."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sat_ext.config import load
from sat_ext.errors import ConfigError
from sat_ext.models.config import AutoencoderConfig, ModelConfig, TransformerConfig

BLOCKS_FETCHED = 2  # swapped blocks on the GPU at a time


def load_model_config(mapping: Mapping[str, Any]) -> ModelConfig:
    """The `model:` mapping with the architecture of its folder, if it names one.

    Raises `ConfigError` for unknown keys, for a folder that is missing or incomplete, for a folder that holds
    another architecture than the YAML says, for channel counts that do not fit together, and for levers on memory
    that do not work together."""
    config = load(ModelConfig, mapping, "model")
    if config.pretrained is not None:
        config = _with_folder(config, config.pretrained, expects="transformer" in mapping)
    _check_channels(config)
    _check_levers(config)
    return config


def expected_config(model: Mapping[str, Any]) -> ModelConfig:
    """`load_model_config`; without its folder on this machine, with the architecture that the YAML expects."""
    config = load(ModelConfig, model, "model")
    if config.pretrained is None or Path(config.pretrained).is_dir():
        return load_model_config(model)
    return config


def folder_config(pretrained: str, subfolder: str, name: str = "config.json") -> dict[str, Any]:
    """`<pretrained>/<subfolder>/<name>` as a dict; `ConfigError` if the folder or the file is missing."""
    if not Path(pretrained).is_dir():
        raise ConfigError(f"model.pretrained: no folder {pretrained}; give the path of a diffusers model.")
    file = Path(pretrained, subfolder, name)
    if not file.is_file():
        raise ConfigError(
            f"model.pretrained: {pretrained} has no {subfolder}/{name}; "
            "a diffusers model has transformer/, vae/, text_encoder/, tokenizer/ and scheduler/."
        )
    return json.loads(file.read_text(encoding="utf-8"))


def check_zero(config: ModelConfig, stage: int) -> None:
    """Raise `ConfigError` for levers that do not work with this ZeRO stage."""
    if stage == 3 and config.without_zero3:
        raise ConfigError(
            f"{config.without_zero3}, but ZeRO-3 shards all weights and gathers them itself; use stage 2, or "
            "without the lever configs/zero/zero3-offload.yaml."
        )


def _with_folder(config: ModelConfig, folder: str, *, expects: bool) -> ModelConfig:
    if config.first_stage.kind != "autoencoder" or config.text.kind != "t5":
        raise ConfigError(
            "model.pretrained: the folder brings an autoencoder and a T5 encoder, but the YAML asks for "
            f"first_stage.kind '{config.first_stage.kind}' and text.kind '{config.text.kind}'; remove these."
        )
    found = _architecture(TransformerConfig, folder_config(folder, "transformer"))
    for key, expected in asdict(config.transformer).items() if expects else ():
        # the sizes of samples that a model was trained on do not change its weights
        if not key.startswith("sample_") and getattr(found, key) != expected:
            raise ConfigError(
                f"model.pretrained: {folder} has {key} {getattr(found, key)}, but model.transformer.{key} is "
                f"{expected}; use the YAML of the model in that folder."
            )
    autoencoder = _architecture(AutoencoderConfig, folder_config(folder, "vae"))
    return replace(config, transformer=found, first_stage=replace(config.first_stage, autoencoder=autoencoder))


def _architecture(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """The dataclass `cls` of those of `values` (a config.json) that it has fields for."""
    kept = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    return load(cls, kept, "config.json")


def _check_channels(config: ModelConfig) -> None:
    transformer, latent = config.transformer, config.latent_channels
    expected = latent * (2 if config.conditioning == "i2v" else 1)
    if (transformer.in_channels, transformer.out_channels) != (expected, latent):
        raise ConfigError(
            f"model.transformer: in_channels {transformer.in_channels} and out_channels "
            f"{transformer.out_channels} do not fit conditioning '{config.conditioning}' with {latent} "
            f"latent channels; it takes {expected} and {latent}."
        )


def _check_levers(config: ModelConfig) -> None:
    train, text, swap, layers = config.train, config.text, config.block_swap, config.transformer.num_layers
    if train.mode == "full" and train.quantization != "none":
        raise ConfigError(
            f"model.train.quantization: {train.quantization} is for frozen weights, and mode: full trains them; "
            "use mode: lora, or quantization: none."
        )
    if train.mode == "full" and swap:
        raise ConfigError(
            f"model.block_swap: {swap}, but swapped weights are never written back, and mode: full trains them; "
            "use mode: lora, or an offloading YAML of configs/zero/."
        )
    if swap and (config.checkpointing is None or config.checkpointing.every != 1):
        raise ConfigError(
            f"model.block_swap: {swap}, but a block's weights come back for the backward pass only when it is "
            "recomputed; set model.gradient_checkpointing: true."
        )
    if swap and not BLOCKS_FETCHED < swap <= layers:
        some = f"give {BLOCKS_FETCHED + 1} to {layers}, or 0 for none" if layers > BLOCKS_FETCHED else "use 0"
        raise ConfigError(
            f"model.block_swap: {swap}; two blocks are on the GPU at a time, and the model has {layers}; {some}."
        )
    if text.quantization != "none" and (text.kind, text.device) != ("t5", "gpu"):
        raise ConfigError(
            f"model.text.quantization: {text.quantization} is for a folder's T5 that stays on the GPU, but the "
            f"YAML has kind: {text.kind}, device: {text.device}; use kind: t5, device: gpu, or quantization: none."
        )
