"""What DeepSpeed's section says that memory follows from, with DeepSpeed's own defaults. Pure."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sat_ext.config import convert
from sat_ext.errors import ConfigError
from sat_ext.zero import fill_in_auto

Device = Literal["none", "cpu", "nvme"]
ALLREDUCE = (
    500_000_000  # numbers at a time without ZeRO (MEMORY_OPT_ALLREDUCE_SIZE in deepspeed/runtime/engine.py)
)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Bytes that an optimizer keeps for a number that trains, and takes beside them while it steps."""

    states: float
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """`zero_optimization`; sizes are numbers, not bytes. Defaults: deepspeed/runtime/zero/config.py (0.19).

    `fp32_gradients`: they are accumulated so (`data_types.grad_accum_dtype`). `node`: GPUs among which ZeRO-3's
    weights are split a second time (hpZ); 1 where they are not.
    """

    stage: int
    offload_optimizer: Device
    offload_param: Device
    pin_optimizer: bool
    pin_param: bool
    overlap: bool
    contiguous: bool
    reduce_bucket: int
    persistence: int
    model_persistence: int
    max_live: int
    prefetch: int
    sub_group: int
    node: int
    optimizer_buffers: int
    param_buffers: int
    param_buffer: int
    params_in_cpu: int
    fp32_gradients: bool
    optimizer: Optimizer


def read_options(deepspeed: Mapping[str, Any], width: int) -> Options:
    """The options of a `deepspeed` section; "auto" sizes follow from the model's `width`. Raises `ConfigError`."""
    deepspeed = fill_in_auto(deepspeed, width)
    zero = deepspeed.get("zero_optimization") or {}
    stage = convert(int, zero.get("stage", 0), "deepspeed.zero_optimization.stage")
    if not 0 <= stage <= 3:
        raise ConfigError(f"deepspeed.zero_optimization.stage: {stage}; give 0, 1, 2 or 3.")
    optimizer, param = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    offload: Device = optimizer.get("device", "cpu" if zero.get("cpu_offload") else "none")

    def numbers(name: str, default: float, prefix: str = "") -> int:
        value = zero.get(prefix + name, zero.get(name, default))
        return int(convert(float, value, f"deepspeed.zero_optimization.{prefix}{name}"))

    return Options(
        stage=stage,
        offload_optimizer=offload if stage else "none",
        offload_param=param.get("device", "none") if stage == 3 else "none",
        pin_optimizer=bool(optimizer.get("pin_memory")),
        pin_param=bool(param.get("pin_memory")),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        contiguous=bool(zero.get("contiguous_gradients", True)),
        reduce_bucket=numbers("reduce_bucket_size", 5e8),
        persistence=numbers("param_persistence_threshold", 1e5, "stage3_"),
        model_persistence=numbers("model_persistence_threshold", sys.maxsize, "stage3_"),
        max_live=numbers("max_live_parameters", 1e9, "stage3_"),
        prefetch=numbers("prefetch_bucket_size", 5e7, "stage3_"),
        node=numbers("zero_hpz_partition_size", 1) if stage == 3 else 1,
        sub_group=numbers("sub_group_size", 1e9),
        optimizer_buffers=int(optimizer.get("buffer_count", 4)),
        param_buffers=int(param.get("buffer_count", 5)),
        param_buffer=int(float(param.get("buffer_size", 1e8))),
        params_in_cpu=int(float(param.get("max_in_cpu", 1e9))),
        fp32_gradients=str((deepspeed.get("data_types") or {}).get("grad_accum_dtype")) == "fp32",
        optimizer=_optimizer(deepspeed.get("optimizer") or {}, offload),
    )


def _optimizer(section: Mapping[str, Any], offload: Device) -> Optimizer:
    """By its name: two fp32 moments unless it is one of these."""
    name, params = str(section.get("type", "AdamW")), section.get("params") or {}
    last = name.rpartition(".")[2].lower()
    if "8bit" in last:  # two moments of a byte, and an fp32 scale for each block of 256 (bitsandbytes)
        states = 1 if "lion" in last else 2
        return Optimizer(states=states * (1 + 4 / 256))
    if last == "fusedemaadam":
        return Optimizer(states=12)
    if last in ("lion", "fusedlion", "adagrad", "muon"):
        return Optimizer(states=4)
    if last == "sgd":
        return Optimizer(states=4 if params.get("momentum") else 0, step=4)
    if params.get("torch_adam") and not params.get("fused") and offload == "none":
        # torch's own, which on a GPU works on lists of tensors: a root of the second moment of all at once
        return Optimizer(states=8, step=4)
    return Optimizer(states=8)
