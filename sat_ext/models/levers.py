"""The levers on memory in the YAML's `model:`, and the combinations of them that make no sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sat_ext.errors import ConfigError

if TYPE_CHECKING:
    from sat_ext.models.config import ModelConfig

Quantization = Literal["none", "nf4", "fp8"]


@dataclass(frozen=True, kw_only=True)
class GradientCheckpointing:
    """Keep the input of a block of the transformer alone, and compute the rest anew in the backward pass.

    `every`: of so many blocks one is recomputed; 1 is all of them, the least memory for a third more computing.
    `offload`: those inputs wait in pinned CPU memory, copied while the GPU computes.
    """

    every: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"model.gradient_checkpointing.every: {self.every}; give 1 (all blocks) or more.")


def recomputes_all(given: bool | GradientCheckpointing) -> bool:
    """Whether gradient checkpointing is on for every block."""
    return given if isinstance(given, bool) else given.every == 1


def check_levers(config: ModelConfig) -> None:
    """Raise `ConfigError` for levers of `config` that do not go together."""
    train, text = config.train, config.text
    if config.block_swap < 0:
        raise ConfigError(f"model.block_swap: {config.block_swap} blocks; give 0 (none) or more.")
    if config.block_swap and train.mode != "lora":
        raise ConfigError(
            f"model.block_swap: {config.block_swap} moves frozen weights, and train.mode 'full' has none; take "
            "configs/zero/zero3-offload.yaml for full training, or train.mode: lora."
        )
    if config.block_swap and not recomputes_all(config.gradient_checkpointing):
        raise ConfigError(
            f"model.block_swap: {config.block_swap} needs gradient checkpointing of every block, whose weights "
            "are kept for the backward pass without; write 'gradient_checkpointing: true'."
        )
    if train.quantization != "none" and train.mode != "lora":
        raise ConfigError(
            f"model.train.quantization: {train.quantization} is for the frozen weights below a LoRA, and "
            f"train.mode is '{train.mode}'; write 'mode: lora', or take the quantization out."
        )
    if train.quantization != "none" and config.pretrained is None:
        raise ConfigError(
            f"model.train.quantization: {train.quantization} leaves the weights below the LoRA out of "
            "checkpoints, and no folder gives them back; set model.pretrained."
        )
    if text.kind == "byt5" and (text.device != "gpu" or text.quantization != "none"):
        raise ConfigError("model.text: kind 'byt5' is tiny; leave 'device' and 'quantization' to kind 't5'.")
    if text.quantization != "none" and text.device != "gpu":
        raise ConfigError(
            f"model.text.quantization: {text.quantization} is computed on the GPU, and device is '{text.device}'; "
            "leave one of the two out."
        )
    if config.first_stage.frames < 4 or config.first_stage.frames % 4:
        raise ConfigError(
            f"model.first_stage.frames: {config.first_stage.frames}; give a multiple of 4, the frames that become "
            "one latent frame (8 is the default)."
        )


def check_zero(config: ModelConfig, stage: int) -> None:
    """Raise `ConfigError` for levers of `config` that ZeRO stage `stage` has no use for, or cannot split."""
    for key, value in (("train.quantization", config.train.quantization), ("block_swap", config.block_swap)):
        if stage == 3 and value not in ("none", 0):
            raise ConfigError(
                f"model.{key}: {value} does not go with ZeRO-3, which splits and moves weights itself; take "
                "configs/zero/zero1.yaml or zero2.yaml."
            )
