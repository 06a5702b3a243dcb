"""Checks of the levers on memory in the YAML's `model:` that do not work together."""

from sat_ext.errors import ConfigError
from sat_ext.models.config import ModelConfig

BLOCKS_FETCHED = 2  # of those that are swapped, on the GPU at a time


def check_levers(config: ModelConfig, layers: int) -> None:
    """Raise `ConfigError` for levers that do not work together in a transformer of `layers` layers."""
    lora, swap = config.train.mode == "lora", config.block_swap
    if config.train.quantization != "none" and not lora:
        raise ConfigError(
            f"model.train.quantization: {config.train.quantization} is for frozen weights, and mode: full trains "
            "them; use mode: lora, or quantization: none."
        )
    if swap and not lora:
        raise ConfigError(
            f"model.block_swap: {swap}, but swapped weights are never written back, and mode: full trains them; "
            "use mode: lora, or an offloading YAML of configs/zero/."
        )
    lever = config.checkpointing
    if swap and (lever is None or lever.every != 1):
        raise ConfigError(
            f"model.block_swap: {swap}, but a block's weights come back for the backward pass only when it is "
            "recomputed; set model.gradient_checkpointing: true."
        )
    if swap and not BLOCKS_FETCHED < swap <= layers:
        raise ConfigError(
            f"model.block_swap: {swap}; two blocks are on the GPU at a time, and the model has {layers}; give "
            f"{BLOCKS_FETCHED + 1} to {layers}, or 0 for none."
        )
    if config.text.quantization != "none" and (config.text.kind != "t5" or config.text.device != "gpu"):
        found = f"kind: {config.text.kind}" if config.text.kind != "t5" else f"device: {config.text.device}"
        raise ConfigError(
            f"model.text.quantization: {config.text.quantization} is for a folder's T5 that stays on the GPU, but "
            f"the YAML has {found}; use kind: t5 with device: gpu, or quantization: none."
        )


def check_zero(config: ModelConfig, stage: int) -> None:
    """Raise `ConfigError` for levers that do not work with this ZeRO stage."""
    quantization, swap = config.train.quantization, config.block_swap
    if stage < 3 or (quantization == "none" and not swap):
        return
    lever = f"model.block_swap: {swap}" if swap else f"model.train.quantization: {quantization}"
    raise ConfigError(
        f"{lever}, but ZeRO-3 shards all weights and gathers them itself; use stage 2, or without the lever "
        "configs/zero/zero3-offload.yaml."
    )
