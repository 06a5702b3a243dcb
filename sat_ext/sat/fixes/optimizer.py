"""What SAT's own optimizer needs, told before a model is built."""

from __future__ import annotations

import argparse
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sat_ext.errors import ConfigError


def ema_optimizer(args: argparse.Namespace) -> bool:
    """Symptom: `sat.ops.FusedEmaAdam`, the optimizer of CogVideo's YAML, fails after the model is loaded, at the
    first step, or at the first checkpoint where its needs are not met.

    They are told at once, with an optimizer that runs here. Raises `ConfigError`.
    """
    config = getattr(args, "deepspeed_config", None) or {}
    if (config.get("optimizer") or {}).get("type") != "sat.ops.FusedEmaAdam":
        return False
    zero = config.get("zero_optimization") or {}
    for missing in (_of_zero(zero), _of_gpu()):
        if missing:
            raise ConfigError(
                f"deepspeed.optimizer.type: sat.ops.FusedEmaAdam {missing}; write 'type: AdamW'"
                f"{_options(zero)}, which keeps no average of the weights."
            )
    return True


def _of_zero(zero: dict[str, Any]) -> str | None:
    stage = zero.get("stage", 0)
    if stage not in (1, 2):
        return f"needs ZeRO stage 1 or 2, where SAT finds its average of the weights, and the YAML has {stage}"
    if _is_offloaded(zero):
        return "updates weights on the GPU, and the YAML keeps the optimizer's on the CPU"
    return None


def _of_gpu() -> str | None:
    """What is missing on this machine, of what `sat/ops/ops_builder` asks for; None where nothing is."""
    if not torch.cuda.is_available():
        return "runs on a GPU, and there is none"
    if find_spec("ninja") is None:
        return "is compiled at its first use, and the Python package ninja is not installed"
    if find_spec("distutils") is None:
        return "is compiled with distutils, which this Python has no more (setuptools brings it back)"
    from torch.utils.cpp_extension import CUDA_HOME

    compiler = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not compiler.is_file():
        return "is compiled at its first use, and there is no nvcc (set CUDA_HOME to a CUDA toolkit)"
    shown = subprocess.run([str(compiler), "-V"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", shown)
    version, wanted = found[1] if found else "unknown", ".".join(str(torch.version.cuda).split(".")[:2])
    if version != wanted and not (version.startswith("11.") and wanted.startswith("11.")):
        return f"is compiled at its first use by an nvcc of CUDA {wanted}, and {compiler} is of {version}"
    return None


def _options(zero: dict[str, Any]) -> str:
    """What else to write: with offload DeepSpeed has an optimizer for the CPU; torch's own compiles nothing."""
    if _is_offloaded(zero):
        return " (DeepSpeed then takes its DeepSpeedCPUAdam)"
    return " and 'torch_adam: true' under its params"


def _is_offloaded(zero: dict[str, Any]) -> bool:
    return bool(zero.get("cpu_offload")) or (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
