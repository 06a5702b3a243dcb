"""One whole file of weights from all of ZeRO-3's partitions."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sat_ext.sat.checkpoint.matching import in_checkpoint
from sat_ext.sat.checkpoint.partitions import gather_weights


def save(args: argparse.Namespace) -> bool:
    """Symptom: under ZeRO-3, SAT saves the first rank's shard and drops the others; under ZeRO-0 in fp32, saving
    dies with "'AdamW' object has no attribute 'optimizer'".

    The weights of ZeRO-3 are gathered from all ranks, one module at a time, and saved as one
    `mp_rank_00_model_states.pt`, as under the other stages. Frozen encoders are left out: they have files of their
    own.
    """
    return True


def whole_weights(save_checkpoint: Callable[..., None]) -> Callable[..., None]:
    """SAT's save, but for ZeRO-3."""
    from sat import mpu
    from sat.training import model_io

    def save(iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, args: Any) -> None:
        if not model.zero_optimization_partition_weights():
            # SAT looks for its own FusedEmaAdam inside of DeepSpeed's wrapper, and there is none in this case
            wrapped = optimizer if hasattr(optimizer, "optimizer") else None
            return save_checkpoint(iteration, model, wrapped, lr_scheduler, args)
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

    return save
