"""What the `deepspeed` section may hold: refused is what DeepSpeed, or SAT's loop around it, does not survive."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DtypeEnum
from pydantic import ValidationError

from sat_ext.config import convert, reject_unknown_keys
from sat_ext.errors import ConfigError

# Top level keys of DeepSpeed's configuration (deepspeed.ai/docs/config-json) that were tried with SAT's loop.
DEEPSPEED_KEYS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "fp16",
    "bf16", "zero_optimization", "gradient_clipping", "prescale_gradients", "gradient_predivide_factor",
    "communication_data_type", "steps_per_print", "wall_clock_breakdown", "dump_state", "activation_checkpointing",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio", "checkpoint", "data_types",
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


def check_keys(config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """What the YAML says, as it stands: the `deepspeed` section, and `args`. Raises `ConfigError`."""
    if "scheduler" in config:
        raise ConfigError(
            "deepspeed.scheduler: SAT sets the learning rate itself, and two schedules make it 0; remove it, "
            "and use args.warmup, lr_decay_style and lr_decay_ratio."
        )
    reject_unknown_keys(config, (*DEEPSPEED_KEYS, *UNREAD), "deepspeed")
    for name in _MAPPINGS:
        convert(dict[str, Any], config.get(name) or {}, f"deepspeed.{name}")
    convert(dict[str, Any], (config.get("optimizer") or {}).get("params") or {}, "deepspeed.optimizer.params")
    if not isinstance(stage := (config.get("zero_optimization") or {}).get("stage", 0), int):
        raise ConfigError(f"deepspeed.zero_optimization.stage: {stage!r} is not one of 0, 1, 2, 3.")
    for name in _COUNTS:
        if config.get(name) is not None:
            convert(int, config[name], f"deepspeed.{name}")
    for name, place in TWICE.items():
        here: Any = config
        for key in place:
            here = (here or {}).get(key)
        if here is not None:
            convert(float, here, f"deepspeed.{'.'.join(place)}")
        if None not in (here, settings.get(name)) and float(here) != float(settings[name]):
            raise ConfigError(
                f"args.{name}: {settings[name]}, but deepspeed.{'.'.join(place)} is {here} and takes precedence; "
                "set it only there."
            )


def check_section(config: Mapping[str, Any], ranks: int, *, checkpoints_activations: bool) -> None:
    """What the run makes of it: `config` with all batch sizes, on so many `ranks`. Raises `ConfigError`.

    `checkpoints_activations`: the engine has DeepSpeed do it, as CogVideo's can.
    """
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
    counts = {name: config.get(name) for name in _COUNTS}
    total, micro, steps = counts.values()
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
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if stage and config.get("prescale_gradients"):
        raise ConfigError(f"deepspeed.prescale_gradients: true does not work with ZeRO stage {stage}; remove it.")
    if stage > 1 and (factor := config.get("gradient_predivide_factor") or 1.0) != 1.0:
        raise ConfigError(
            f"deepspeed.gradient_predivide_factor: {factor} does not work with ZeRO stage {stage}; remove it."
        )
    section = {k: v for k, v in deepcopy(dict(config)).items() if k not in ("train_batch_size", *UNREAD)}
    try:
        DeepSpeedConfig(section)  # once more when the model is there, where it would end in a traceback
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
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if "fp16" in on and not stage:  # measured with 0.19: the update is divided by a scale that the loss never had
        raise ConfigError(
            "deepspeed.fp16.enabled: without ZeRO DeepSpeed does not scale the loss; use ZeRO stage 1 "
            "(it takes no more memory), or bf16."
        )
    kinds = config.get("data_types") or {}
    named = {}
    for key in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        if kinds.get(key) is not None:
            try:
                named[key] = DtypeEnum(kinds[key]).name
            except ValueError as error:
                raise ConfigError(
                    f"deepspeed.data_types.{key}: {kinds[key]!r} is not one of fp32, fp16, bf16."
                ) from error
    model = on[0] if on else "fp32"
    if named.get("param_dtype", model) != model:
        raise ConfigError(
            f"deepspeed.data_types.param_dtype: {named['param_dtype']}, and the run trains in {model} ("
            "fp16.enabled and bf16.enabled); remove it."
        )
    if not stage and named.get("grad_accum_dtype", model) != model:
        raise ConfigError(
            f"deepspeed.data_types.grad_accum_dtype: {named['grad_accum_dtype']} beside weights in {model} needs "
            "ZeRO stage 1, 2 or 3."
        )
