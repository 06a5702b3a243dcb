"""What SAT's own optimizer needs, checked before a model is built."""

import argparse

import torch

from sat_ext.errors import ConfigError
from sat_ext.zero import offloads_optimizer, zero_of


def ema_optimizer(args: argparse.Namespace) -> bool:
    """Symptom: `sat.ops.FusedEmaAdam`, the optimizer of CogVideo's YAML, fails after the model is loaded, at the
    first step, or at the first checkpoint where its needs are not met.

    The error comes at once, with an optimizer that runs here. Raises `ConfigError`.
    """
    config = getattr(args, "deepspeed_config", None) or {}
    if (config.get("optimizer") or {}).get("type") != "sat.ops.FusedEmaAdam":
        return False
    stage, offloaded = zero_of(args).get("stage", 0), offloads_optimizer(zero_of(args))
    if stage not in (1, 2):
        missing = f"needs ZeRO stage 1 or 2, where SAT finds its average of the weights, and the YAML has {stage}"
    elif offloaded:
        missing = "updates weights on the GPU, and the YAML keeps the optimizer's on the CPU"
    elif not torch.cuda.is_available():
        missing = "runs on a GPU, and there is none"
    else:
        return True
    # with offload DeepSpeed has an optimizer for the CPU; PyTorch's own needs no compiler
    more = (
        " (DeepSpeed then takes its DeepSpeedCPUAdam)" if offloaded else " and 'torch_adam: true' under its params"
    )
    raise ConfigError(
        f"deepspeed.optimizer.type: sat.ops.FusedEmaAdam {missing}; write 'type: AdamW'{more}, which keeps no "
        "average of the weights."
    )
