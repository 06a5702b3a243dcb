"""`zero_optimization` of each file in `configs/zero/`, and what other code reads in a `deepspeed` section."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from sat_ext.errors import ConfigError

AUTO = "auto"

# In elements, from the transformer's hidden size. The first four are those of Hugging Face's trainers for ZeRO-3
# (`trainer_config_finalize` in transformers/integrations/deepspeed.py); DeepSpeed's defaults are made for
# models many times this one's size, and take gigabytes. The last two hold about two of CogVideoX's blocks, which
# have 14 hidden^2 weights each (12 in attention and feed-forward, and the modulation of their norms).
AUTO_SIZES: dict[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden**2,
    "allgather_bucket_size": lambda hidden: hidden**2,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden**2),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
    "stage3_max_live_parameters": lambda hidden: 28 * hidden**2,
    "stage3_max_reuse_distance": lambda hidden: 28 * hidden**2,
}

# The largest weight of a published model: the token embedding of T5 v1.1 XXL. `offload_param.buffer_size` must
# hold a rank's part of every weight, on one GPU the whole (DeepSpeed's partitioned_param_swapper.py asserts it).
T5_EMBEDDING = 32128 * 4096

_PARTS = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": AUTO}
_ZERO2 = {"stage": 2, **_PARTS, "allgather_bucket_size": AUTO}
_ZERO3 = {
    "stage": 3,
    **_PARTS,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
    "stage3_max_live_parameters": AUTO,
    "stage3_max_reuse_distance": AUTO,
}
# messages of 100 MB, which it takes to keep a node's links busy (ZeRO++, arXiv 2306.10209, section 3)
_ZERO3_8GPUS = {**_ZERO3, "reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 50_000_000}
_CPU = {"device": "cpu", "pin_memory": True}
_NVME = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}

# The planner compares these without the files, which are not part of an installed package. What each is for, and
# what it costs, is said in its file; the costs are from ZeRO (arXiv 1910.02054, section 7), ZeRO-Offload
# (2101.06840), ZeRO-Infinity (2104.07857) and, for two nodes, hpZ of ZeRO++.
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {**_ZERO2, "stage": 1},
    "zero2": _ZERO2,
    "zero2-offload": {**_ZERO2, "offload_optimizer": _CPU},
    "zero3": _ZERO3,
    "zero3-offload": {**_ZERO3, "offload_optimizer": _CPU, "offload_param": _CPU},
    "zero3-nvme": {
        **_ZERO3,
        "offload_optimizer": {**_NVME, "buffer_count": 4},
        "offload_param": {**_NVME, "buffer_count": 8, "buffer_size": AUTO},
    },
    "zero3-8gpus": _ZERO3_8GPUS,
    "zero3-2nodes": {**_ZERO3_8GPUS, "zero_hpz_partition_size": 8},
}
ZERO_NAMES = tuple(ZERO)


def fill_in_auto(deepspeed: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """`deepspeed`, a section as in the YAML, with numbers for every "auto"; `hidden` is the model's hidden size.
    Raises `ConfigError` for an "auto" for which there is no rule."""
    filled = deepcopy(dict(deepspeed))
    zero = filled.get("zero_optimization")
    if isinstance(zero, dict):
        for key, size in AUTO_SIZES.items():
            if zero.get(key) == AUTO:
                zero[key] = size(hidden)
        param = zero.get("offload_param")
        if isinstance(param, dict) and param.get("buffer_size") == AUTO:
            param["buffer_size"] = max(T5_EMBEDDING, 4 * hidden**2)  # or the transformer's: its feed-forward's
        if "offload_optimizer" in zero:
            zero.pop("cpu_offload", None)  # CogVideo's YAML has it, and DeepSpeed refuses it beside its successor
    _refuse_auto(filled, "deepspeed")
    return filled


def precision(deepspeed: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a `deepspeed` section turns on fp16, and bf16. Raises `ConfigError`."""
    found = []
    for name in ("fp16", "bf16"):
        part = deepspeed.get(name) or {}
        if not isinstance(part, Mapping):
            raise ConfigError(f"deepspeed.{name}: expected a mapping of keys, got {part!r}; write enabled: true.")
        found.append(bool(part.get("enabled")))
    return found[0], found[1]


def zero_of(args: Any) -> Mapping[str, Any]:
    """`deepspeed.zero_optimization` of SAT's `args`, empty if it is not there."""
    return (getattr(args, "deepspeed_config", None) or {}).get("zero_optimization") or {}


def _refuse_auto(section: Mapping[str, Any], where: str) -> None:
    for key, value in section.items():
        if value == AUTO:
            raise ConfigError(
                f"{where}.{key}: 'auto' is known for {', '.join(AUTO_SIZES)} and offload_param.buffer_size of "
                "zero_optimization; write a value."
            )
        if isinstance(value, Mapping):
            _refuse_auto(value, f"{where}.{key}")
