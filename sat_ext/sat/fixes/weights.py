"""Weights into and out of SAT's own checkpoints: safely, without a copy per rank, and whole under ZeRO-3."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sat import mpu
from torch import nn

from sat_ext.checkpoint.reading import RNG_STATE_TYPES, read_file, under_adapters
from sat_ext.errors import ConfigError
from sat_ext.sat.checkpoint.matching import check_names, in_checkpoint, lacks
from sat_ext.sat.checkpoint.partitions import gather_weights, gathered_loading
from sat_ext.sat.run import run_of
from sat_ext.sat.standin import StandIn, replaced


def resume(_args: argparse.Namespace) -> bool:
    """Symptom: torch >= 2.6 refuses SAT's checkpoints ("Weights only load failed"): they hold a NumPy RNG state.

    Allows exactly the types that this state is made of; nothing else in a checkpoint can run code."""
    torch.serialization.add_safe_globals(RNG_STATE_TYPES)
    return True


def load(_args: argparse.Namespace) -> bool:
    """Symptom: every rank reads the whole checkpoint into its own memory, under ZeRO-3 no weight fits ("size
    mismatch [...] torch.Size([0])"), and with `force_train` a checkpoint of another model leaves random weights.
    """
    return True


def mapped_and_checked(
    load_checkpoint: Callable[..., int], model: nn.Module, args: argparse.Namespace, *rest: Any, **options: Any
) -> int:
    """SAT's load, which reads its file through ours. Raises `ConfigError` if that does not fit the model."""
    from sat.training import model_io

    module = getattr(model, "module", model)
    assert isinstance(module, nn.Module)
    belongs = in_checkpoint(module)
    names = {name for name, _ in module.named_parameters()}
    state: dict[str, Any] = {}

    def read(file: str, **_: Any) -> dict[str, Any]:
        state.update(read_file(Path(file)))  # mapped: the ranks of a machine share its pages
        return {**state, "module": under_adapters(state["module"], names)}

    def forgive(_: nn.Module, keys: Any) -> None:
        check_names(module, state["module"], args)
        # encoders have files of their own
        keys.missing_keys[:] = [name for name in keys.missing_keys if belongs(name)]
        if args.force_train and not hasattr(module, "reinit"):
            keys.missing_keys.clear()  # SAT asks every model to initialize them, and only its own can

    hook = module.register_load_state_dict_post_hook(forgive)
    try:
        with gathered_loading(module), replaced(model_io, "torch", StandIn(model_io.torch, load=read)):
            iteration = load_checkpoint(model, args, *rest, **options)
    except AssertionError as error:  # SAT's, for weights of the model that are not in the file
        raise lacks(args, str(error)[:200] or "mixins") from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        reason = str(error).split("\n\t")[1].rstrip(".")
        raise ConfigError(
            f"args.load: {args.load} is of another model than the YAML's ({reason}); name a checkpoint of "
            "this model, or that model's YAML."
        ) from error
    finally:
        hook.remove()
    if args.mode == "pretrain":
        run_of(args).schedule = state.get("client_lr_scheduler") or {}
    return iteration


def save(_args: argparse.Namespace) -> bool:
    """Symptom: under ZeRO-3, SAT saves the first rank's shard and drops the others; under ZeRO-0 in fp32, saving
    dies with "'AdamW' object has no attribute 'optimizer'"."""
    return True


def whole_weights(
    save_checkpoint: Callable[..., None], iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, args: Any
) -> None:
    """SAT's save; under ZeRO-3 the same files, with the weights of all ranks."""
    from sat.training import model_io

    if not model.zero_optimization_partition_weights():
        # SAT looks for its own FusedEmaAdam inside DeepSpeed's wrapper; ZeRO-0 in fp32 has no wrapper
        wrapped = optimizer if hasattr(optimizer, "optimizer") else None
        return save_checkpoint(iteration, model, wrapped, lr_scheduler, args)
    weights = gather_weights(model.module, in_checkpoint(model.module))
    if mpu.get_data_parallel_rank() == 0:
        file = Path(model_io.get_checkpoint_name(args.save, iteration))
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {"module": weights, "iteration": iteration}
        if lr_scheduler is not None:
            state["client_lr_scheduler"] = lr_scheduler.state_dict()
        torch.save(state, file)
        Path(model_io.get_checkpoint_tracker_filename(args.save)).write_text(str(iteration))
        config = model_io.extract_model_specific_args_to_dump(args, model)
        (Path(args.save) / "model_config.json").write_text(json.dumps(config, indent=4))
    torch.distributed.barrier()
