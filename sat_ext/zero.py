"""The `deepspeed:` sections of `configs/zero/`, by name, and the sizes in them that follow from the model.

| name | weights | gradients | optimizer states | costs |
|---|---|---|---|---|
| zero0 | each GPU | each GPU | each GPU | nothing |
| zero1 | each GPU | each GPU | split | nothing over zero0 [1] |
| zero2 | each GPU | split | split | nothing over zero0 [1] |
| zero3 | split | split | split | half as much communication again [1] |
| zero2-offload | each GPU | CPU | CPU | gradients and new weights over PCIe, the CPU's update [2] |
| zero3-offload | CPU | CPU | CPU | each block's weights over PCIe three times a step besides [3] |
| zero3-nvme | NVMe | CPU | NVMe | all of these from and to a disk [3] |
| zero3-8gpus | split | split | split | zero3's, in larger messages |
| zero3-2nodes | split, and in each node | split | split | a second part on each GPU; only forward crosses [4] |

[1] Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 7:
communication of stages 1 and 2 is that of plain data parallelism, of stage 3 1.5 times as much.
[2] Ren et al. 2021, "ZeRO-Offload: Democratizing Billion-Scale Model Training".
[3] Rajbhandari et al. 2021, "ZeRO-Infinity: Breaking the GPU Memory Wall for Extreme Scale Deep Learning". Three
times: forward, its recomputation under gradient checkpointing, backward; the last two follow each other.
[4] Wang et al. 2023, "ZeRO++: Extremely Efficient Collective Communication for Giant Model Training", hpZ.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch

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
_STAGE_1_AND_2 = {**_PARTS, "allgather_bucket_size": AUTO}
_STAGE_3 = {
    "stage": 3,
    **_PARTS,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
    "stage3_max_live_parameters": AUTO,
    "stage3_max_reuse_distance": AUTO,
}
_CPU = {"device": "cpu", "pin_memory": True}
_NVME = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}
_NODE = 8  # GPUs
# PyTorch's kernel: DeepSpeed compiles its FusedAdam at the first start, for which a GPU's machine needs nvcc
_TORCH_ADAM = {"params": {"torch_adam": True, "fused": True}}

_ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1, **_STAGE_1_AND_2},
    "zero2": {"stage": 2, **_STAGE_1_AND_2},
    "zero2-offload": {"stage": 2, **_STAGE_1_AND_2, "offload_optimizer": _CPU},
    "zero3": _STAGE_3,
    "zero3-offload": {**_STAGE_3, "offload_optimizer": _CPU, "offload_param": _CPU},
    "zero3-nvme": {
        **_STAGE_3,
        "offload_optimizer": {**_NVME, "buffer_count": 4},
        "offload_param": {**_NVME, "buffer_count": 8, "buffer_size": AUTO},
    },
    # messages of 100 MB, which a node's links need to be busy (ZeRO++, section 3)
    "zero3-8gpus": {**_STAGE_3, "reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 50_000_000},
    "zero3-2nodes": {
        **_STAGE_3,
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "zero_hpz_partition_size": _NODE,
    },
}
ZERO_NAMES = tuple(_ZERO)


def zero_section(name: str) -> dict[str, Any]:
    """The section `deepspeed:` of `configs/zero/<name>.yaml`, a copy. Raises `KeyError`."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        "zero_optimization": deepcopy(_ZERO[name]),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", **({} if "offload" in str(_ZERO[name]) else _TORCH_ADAM)},
        **({"aio": {"block_size": 1_048_576, "queue_depth": 8}} if name == "zero3-nvme" else {}),
    }


def fill_in_auto(deepspeed: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """`deepspeed`, a section as in the YAML, with numbers for every "auto"; `hidden` is the model's hidden size.

    `cpu_offload`, which CogVideo's YAML has and DeepSpeed does not take beside its successor, gives way to that.
    Raises `ConfigError` for an "auto" that nothing follows from.
    """
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
            zero.pop("cpu_offload", None)
    _refuse_auto(filled, "deepspeed")
    return filled


def precision(deepspeed: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a `deepspeed` section turns on fp16, and bf16. Raises `ConfigError`."""
    found = []
    for name in ("fp16", "bf16"):
        section = deepspeed.get(name) or {}
        if not isinstance(section, Mapping):
            raise ConfigError(
                f"deepspeed.{name}: expected a mapping of keys, got {section!r}; write enabled: true."
            )
        found.append(bool(section.get("enabled")))
    return found[0], found[1]


def training_dtype(fp16: bool, bf16: bool) -> torch.dtype:
    """What a run trains in, as SAT reads `precision`."""
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def zero_of(args: Any) -> Mapping[str, Any]:
    """`deepspeed.zero_optimization` of SAT's `args`; empty where there is none."""
    found: Mapping[str, Any] = (getattr(args, "deepspeed_config", None) or {}).get("zero_optimization") or {}
    return found


def offloads_optimizer(zero: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states are in the memory of the CPU or on a disk."""
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    return bool(zero.get("cpu_offload")) or device != "none"


def _refuse_auto(section: Mapping[str, Any], where: str) -> None:
    for key, value in section.items():
        if value == AUTO:
            raise ConfigError(
                f"{where}.{key}: 'auto' is known for {', '.join(AUTO_SIZES)} and offload_param.buffer_size of "
                "zero_optimization; write a value."
            )
        if isinstance(value, Mapping):
            _refuse_auto(value, f"{where}.{key}")
