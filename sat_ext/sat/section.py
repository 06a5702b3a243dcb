"""What the `deepspeed` section may hold: refuses what DeepSpeed, or SAT's loop around it, does not survive."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig
from pydantic import ValidationError

from sat_ext.config import convert, reject_unknown_keys
from sat_ext.errors import ConfigError

# Top level keys of DeepSpeed's configuration (deepspeed.ai/docs/config-json) that were tried with SAT's loop.
DEEPSPEED_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "fp16",
    "bf16", "zero_optimization", "gradient_clipping", "communication_data_type", "steps_per_print",
    "wall_clock_breakdown", "dump_state", "activation_checkpointing", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "aio", "checkpoint", "data_types",
)  # fmt: skip
UNREAD = ("loss_scale", "loss_scale_window", "hysteresis", "min_loss_scale")  # of CogVideo's sft.yaml
TWICE = {  # of SAT's `args`, and their place here, which SAT and CogVideo go by
    "batch_size": ("train_micro_batch_size_per_gpu",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "lr": ("optimizer", "params", "lr"),
    "weight_decay": ("optimizer", "params", "weight_decay"),
}
_MAPPINGS = (
    "optimizer", "fp16", "bf16", "zero_optimization", "activation_checkpointing", "aio", "checkpoint", "data_types"
)  # fmt: skip
_COUNTS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
Precision = Literal["fp32", "fp16", "bf16"]


def check_keys(config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check the `deepspeed` section and `args` as they are in the YAML. Raises `ConfigError`."""
    if "scheduler" in config:
        raise ConfigError(
            "deepspeed.scheduler: SAT sets the learning rate itself, and two schedules make it 0; remove it, "
            "and use args.warmup, lr_decay_style and lr_decay_ratio."
        )
    reject_unknown_keys(config, (*DEEPSPEED_KEYS, *UNREAD), "deepspeed")
    for name in _MAPPINGS:
        convert(dict[str, Any], config.get(name) or {}, f"deepspeed.{name}")
    convert(dict[str, Any], (config.get("optimizer") or {}).get("params") or {}, "deepspeed.optimizer.params")
    if not isinstance(stage := _stage(config), int):
        raise ConfigError(f"deepspeed.zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3.")
    for name in _COUNTS:
        convert(int | None, config.get(name), f"deepspeed.{name}")
    for name, place in TWICE.items():
        where = f"deepspeed.{'.'.join(place)}"
        here: Any = config
        for key in place:
            here = (here or {}).get(key)
        convert(float | None, here, where)
        if None not in (here, settings.get(name)) and float(here) != float(settings[name]):
            raise ConfigError(
                f"args.{name}: {settings[name]}, but {where} is {here} and takes precedence; set it only there."
            )


def check_section(config: Mapping[str, Any], ranks: int, *, checkpoints_activations: bool) -> None:
    """Check the section of the run: `config` with all batch sizes, on so many `ranks`. Raises `ConfigError`.

    `checkpoints_activations`: whether the engine can leave that to DeepSpeed, as CogVideo's can."""
    _check_precision(config)
    optimizer = config.get("optimizer") or {}
    name = str(optimizer.get("type"))
    if "." not in name and name.lower() not in DEEPSPEED_OPTIMIZERS and not hasattr(torch.optim, name):
        raise ConfigError(
            f"deepspeed.optimizer.type: '{name}' is in neither DeepSpeed nor torch.optim; write 'AdamW', "
            "or another library's by its dotted path."
        )
    if "max_grad_norm" in (optimizer.get("params") or {}):
        raise ConfigError("deepspeed.optimizer.params.max_grad_norm: write deepspeed.gradient_clipping instead.")
    total, micro, steps = (config.get(name) for name in _COUNTS)
    if total is not None and total != (micro or 0) * (steps or 1) * ranks:
        raise ConfigError(
            f"deepspeed.train_batch_size: {total} is not train_micro_batch_size_per_gpu ({micro}) x "
            f"gradient_accumulation_steps ({steps or 1}) x {ranks} ranks; leave it out, it follows from these."
        )
    levers = [k for k, v in (config.get("activation_checkpointing") or {}).items() if v]
    if levers and not checkpoints_activations:
        raise ConfigError(
            f"deepspeed.activation_checkpointing.{levers[0]}: this engine does not checkpoint through DeepSpeed, "
            "so it would change nothing; use model.gradient_checkpointing (docs/memory.md)."
        )
    section = {k: v for k, v in deepcopy(dict(config)).items() if k not in ("train_batch_size", *UNREAD)}
    try:
        DeepSpeedConfig(section)  # DeepSpeed does it too, but after the model is loaded, and with a traceback
    except Exception as error:  # of many kinds: its own, pydantic's, assertions
        reason = " ".join(str(error).split())
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ConfigError(f"deepspeed: DeepSpeed does not take this section: {reason}") from error


def _check_precision(config: Mapping[str, Any]) -> None:
    on = [name for name in ("fp16", "bf16") if (config.get(name) or {}).get("enabled")]
    if len(on) == 2:
        raise ConfigError(
            "deepspeed.fp16.enabled: bf16 is on too, as the files of configs/zero/ have it; for fp16 write "
            "'bf16: {enabled: false}' as well."
        )
    if "fp16" in on and not get_accelerator().is_fp16_supported():
        raise ConfigError("deepspeed.fp16.enabled: this device does not train in fp16; use bf16 or neither.")
    # measured with DeepSpeed 0.19: the update is divided by a scale that the loss was not multiplied by
    if "fp16" in on and not _stage(config):
        raise ConfigError(
            "deepspeed.fp16.enabled: without ZeRO DeepSpeed does not scale the loss; use ZeRO stage 1 "
            "(it takes no more memory), or bf16."
        )
    gradients, weights, _ = (
        convert(Precision | None, (config.get("data_types") or {}).get(key), f"deepspeed.data_types.{key}")
        for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype")
    )
    model = on[0] if on else "fp32"
    if weights not in (None, model):
        raise ConfigError(
            f"deepspeed.data_types.param_dtype: {weights}, and the run trains in {model} (fp16.enabled and "
            "bf16.enabled); remove it."
        )
    if not _stage(config) and gradients not in (None, model):
        raise ConfigError(
            f"deepspeed.data_types.grad_accum_dtype: {gradients} beside weights in {model} needs ZeRO stage 1, 2 "
            "or 3."
        )


def _stage(config: Mapping[str, Any]) -> Any:
    return (config.get("zero_optimization") or {}).get("stage", 0)
