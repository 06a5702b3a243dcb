"""Optimizers of other libraries, by their dotted path."""

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sat.training import deepspeed_training

from sat_ext.config import import_named
from sat_ext.errors import ConfigError
from sat_ext.sat.ema import EmaAdamW
from sat_ext.sat.standin import StandIn, replaced
from sat_ext.zero import zero_of

WHERE = "deepspeed.optimizer"
FOR_DEEPSPEED = ("torch_adam", "adam_w_mode")  # parameters that choose among DeepSpeed's Adams
MOST_AT_ONCE = 2**31 - 1  # numbers in a tensor of bitsandbytes' optimizers


def optimizer_path(args: argparse.Namespace) -> bool:
    """Symptom: SAT takes an optimizer by its dotted path only where that begins with `sat.`; DeepSpeed looks for
    `bitsandbytes.optim.AdamW8bit` in torch, and dies after the model is loaded.

    Raises `ConfigError` for a path that cannot be imported, and for parameters or a place it does not support."""
    config = getattr(args, "deepspeed_config", None) or {}
    section = config.get("optimizer") or {}
    name, params = str(section.get("type", "")), section.get("params") or {}
    if "." not in name or name.startswith("sat."):
        if params:  # YAML files merge: those of configs/zero/ have parameters of PyTorch's Adam
            section["params"] = {k: v for k, v in params.items() if k not in _foreign(name, params)}
        return False
    cls: Any = _optimizer(name, params).func
    zero = zero_of(args)
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if issubclass(cls, EmaAdamW) and (offload == "nvme" or getattr(args, "model_parallel_size", 1) > 1):
        raise ConfigError(
            f"{WHERE}.type: '{name}' does not average on a disk (zero_optimization.offload_optimizer.device: "
            "nvme), nor with model_parallel_size above 1; leave that out, or write 'type: AdamW'."
        )
    if name.startswith("bitsandbytes."):
        _check_place(name, offloaded=bool(zero.get("cpu_offload")) or offload != "none")
    config["zero_force_ds_cpu_optimizer"] = False  # under offload, DeepSpeed would refuse any but its own
    return True


def of_its_path(
    set_up: Callable[..., Any], args: argparse.Namespace, model: Any, *rest: Any, **options: Any
) -> Any:
    """SAT's set-up, with the optimizer's class handed to DeepSpeed."""
    section = args.deepspeed_config.pop("optimizer")  # DeepSpeed would make a second one from it
    name, module = str(section["type"]), deepspeed_training.deepspeed
    make = _optimizer(name, section.get("params") or {})

    def initialize(**arguments: Any) -> Any:
        return module.initialize(**{**arguments, "optimizer": make})

    with replaced(deepspeed_training, "deepspeed", StandIn(module, initialize=initialize)):
        engine, optimizer = set_up(args, model, *rest, **options)
    if isinstance(engine.basic_optimizer, EmaAdamW) and hasattr(optimizer, "fp32_groups"):
        # DeepSpeed's constructor makes a step without gradients: weight decay changes the masters, and it counts
        optimizer.refresh_fp32_params()
        engine.basic_optimizer.state.clear()
    check_sizes(name, optimizer)
    return engine, optimizer


def _foreign(name: str, params: dict[str, Any]) -> list[str]:
    """Parameters of PyTorch's Adam that an optimizer without a path does not take."""
    if name.lower() in ("adam", "adamw", "muon"):
        return [] if params.get("torch_adam") else ["fused"]
    cls = getattr(torch.optim, name, None)
    takes_fused = inspect.isclass(cls) and "fused" in inspect.signature(cls).parameters
    return [*FOR_DEEPSPEED, *([] if takes_fused else ["fused"])]


def _optimizer(name: str, params: dict[str, Any]) -> partial[torch.optim.Optimizer]:
    remedy = f"pip install {name.split('.')[0]}, or check the spelling."
    cls = import_named(name, f"{WHERE}.type: '{name}'", remedy)
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"{WHERE}.type: '{name}' is not a torch.optim.Optimizer; name one.")
    known = inspect.signature(cls).parameters
    params = {k: v for k, v in params.items() if k in known or k not in (*FOR_DEEPSPEED, "fused")}
    if unknown := [key for key in params if key not in known]:
        raise ConfigError(f"{WHERE}.params: {name} takes no '{unknown[0]}'; it takes {', '.join(known)}.")
    return partial(cls, **params)


def check_sizes(name: str, optimizer: Any) -> None:
    """Raise `ConfigError` if bitsandbytes gets more numbers at once than its kernels count: they take an int32
    (`backends/cuda/ops.py`), and the rest would never train."""
    if not name.startswith("bitsandbytes."):
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    flat = [p for group in inner.param_groups for p in group["params"]]
    flat += getattr(optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3's, which take turns in the groups
    if (most := max((p.numel() for p in flat), default=0)) > MOST_AT_ONCE:
        raise ConfigError(
            f"{WHERE}.type: '{name}' would get {most:,} numbers in one group, but counts to {MOST_AT_ONCE:,}; "
            "use more GPUs, ZeRO-3 (whose zero_optimization.sub_group_size is 1e9), a LoRA, or 'type: AdamW'."
        )


def _check_place(name: str, *, offloaded: bool) -> None:
    if offloaded:
        raise ConfigError(
            f"{WHERE}.type: '{name}' updates on the GPU, and zero_optimization.offload_optimizer keeps its states "
            "on the CPU; write 'type: AdamW' (DeepSpeed's own for the CPU), or take offload_optimizer out."
        )
    if not torch.cuda.is_available():
        raise ConfigError(f"{WHERE}.type: '{name}' updates on the GPU, and there is none; write 'type: AdamW'.")
