"""One whole file of weights from all of ZeRO-3's partitions."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ENCODERS = ("conditioner.", "first_stage_model.")  # of CogVideo's engine


def save(args: argparse.Namespace) -> bool:
    """Symptom: under ZeRO-3, SAT saves the first rank's shard and drops the others; under ZeRO-0 in fp32, saving
    dies with "'AdamW' object has no attribute 'optimizer'".

    The weights of ZeRO-3 are gathered from all ranks, one module at a time, and saved as one
    `mp_rank_00_model_states.pt`, as under the other stages. Frozen encoders are left out: they have files of their
    own.
    """
    from sat import mpu
    from sat.training import deepspeed_training, model_io

    original = model_io.save_checkpoint

    def save_checkpoint(iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, args: Any) -> None:
        if not model.zero_optimization_partition_weights():
            # SAT looks for its own FusedEmaAdam inside of DeepSpeed's wrapper, and there is none in this case
            wrapped = optimizer if hasattr(optimizer, "optimizer") else None
            return original(iteration, model, wrapped, lr_scheduler, args)
        weights = gather_weights(model.module, in_checkpoint(model.module))
        if mpu.get_data_parallel_rank() == 0:
            file = Path(model_io.get_checkpoint_name(args.save, iteration))
            os.makedirs(file.parent, exist_ok=True)
            state = {"module": weights, "iteration": iteration}
            if lr_scheduler is not None:
                state["client_lr_scheduler"] = lr_scheduler.state_dict()
            torch.save(state, file)
            Path(model_io.get_checkpoint_tracker_filename(args.save)).write_text(str(iteration))
            config = model_io.extract_model_specific_args_to_dump(args, model)
            (Path(args.save) / "model_config.json").write_text(json.dumps(config, indent=4))
        torch.distributed.barrier()

    deepspeed_training.save_checkpoint = save_checkpoint
    return True


def in_checkpoint(module: nn.Module) -> Callable[[str], bool]:
    """Whether a checkpoint of `module`, ours or CogVideo's engine, holds the weight of a name.

    It need not hold what the YAML alone gives back: CogVideo's frozen T5 and autoencoder have files of their own.
    """
    is_fixed = getattr(module, "is_fixed", None)
    if is_fixed is not None:
        return lambda name: not is_fixed(name)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return lambda name: name in trained or not name.startswith(ENCODERS)


@torch.no_grad()
def gather_weights(module: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Parameters and persistent buffers of `module` in CPU memory, those whose name is `wanted`.

    Every rank must take part, and only the first rank gets them; the others get an empty dict. At most one
    submodule's own parameters are whole at a time.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    weights: dict[str, Tensor] = {}
    first = torch.distributed.get_rank() == 0
    for prefix, part in module.named_modules(remove_duplicate=False):
        names = {name: f"{prefix}.{name}" if prefix else name for name in (*part._parameters, *part._buffers)}
        parameters = {k: p for k, p in part._parameters.items() if p is not None and wanted(names[k])}
        with GatheredParameters(list(parameters.values()), enabled=bool(parameters)):
            if first:
                weights |= {names[k]: p.detach().to("cpu", copy=True) for k, p in parameters.items()}
        if first:
            buffers = {k: b for k, b in part._buffers.items() if b is not None and wanted(names[k])}
            kept = buffers.keys() - part._non_persistent_buffers_set
            weights |= {names[k]: buffers[k].detach().to("cpu", copy=True) for k in buffers if k in kept}
    return weights
