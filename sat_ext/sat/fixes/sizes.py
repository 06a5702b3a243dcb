"""DeepSpeed's buckets in the model's size."""

import argparse
import os
from collections.abc import Mapping
from typing import Any

import torch

from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.zero import AUTO, fill_in_auto, zero_of


def auto_sizes(args: argparse.Namespace) -> bool:
    """Symptom: DeepSpeed takes no "auto", which the files of configs/zero/ and Hugging Face's trainers have for
    sizes that follow from the model; its own defaults take gigabytes; and it dies if a YAML adds
    `offload_optimizer` to CogVideo's `cpu_offload: false` ("Cannot provide deprecated parameter").

    Raises `ConfigError` for any other "auto", and if offload to NVMe cannot work here."""
    config = getattr(args, "deepspeed_config", None)
    zero = zero_of(args)
    _check_nvme(zero)
    if not config or not (_has_auto(config) or {"cpu_offload", "offload_optimizer"} <= zero.keys()):
        return False
    args.deepspeed_config = fill_in_auto(config, engine_of(args.model_config).sequence_shape().hidden_size)
    return True


def _has_auto(section: Mapping[str, Any]) -> bool:
    return any(_has_auto(v) if isinstance(v, Mapping) else v == AUTO for v in section.values())


def _check_nvme(zero: Mapping[str, Any]) -> None:
    """DeepSpeed would end in a compiler's messages after the model is loaded, or fill the system's disk."""
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        if section.get("device") != "nvme":
            continue
        where, path = f"deepspeed.zero_optimization.{name}", str(section.get("nvme_path", ""))
        if not (os.path.isdir(path) and os.access(path, os.W_OK)):
            raise ConfigError(f"{where}.nvme_path: {path} is not a writable folder; name one on an NVMe disk.")
        if missing := _missing_to_compile():
            raise ConfigError(
                f"{where}.device: nvme needs {' and '.join(missing)}, to compile DeepSpeed's reader; "
                "install that, or use configs/zero/zero3-offload.yaml."
            )


def _missing_to_compile() -> list[str]:
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    missing = []
    if not installed_ops.get(AsyncIOBuilder.NAME):
        if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
            missing.append("a CUDA toolkit (nvcc on PATH, or CUDA_HOME)")
        if not AsyncIOBuilder().is_compatible():
            missing.append("libaio with its headers (apt install libaio-dev)")
    return missing
