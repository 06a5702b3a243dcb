"""Weights out of a checkpoint: without running its code, without a copy per rank, and into ZeRO-3's partitions."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sat_ext.checkpoint.reading import RNG_STATE_TYPES, read_file, under_adapters
from sat_ext.errors import ConfigError
from sat_ext.sat.checkpoint.matching import check_names, in_checkpoint, lacks
from sat_ext.sat.checkpoint.partitions import gathered_loading
from sat_ext.sat.run import run_of
from sat_ext.sat.standin import StandIn, replaced


def resume(args: argparse.Namespace) -> bool:
    """Symptom: torch >= 2.6 refuses SAT's checkpoints ("Weights only load failed"): they hold a NumPy RNG state.

    Allows exactly the types that this state is made of; nothing else in a checkpoint can run code.
    """
    torch.serialization.add_safe_globals(RNG_STATE_TYPES)
    return True


def load(args: argparse.Namespace) -> bool:
    """Symptom: every rank reads the whole checkpoint into its own memory, under ZeRO-3 no weight fits ("size
    mismatch [...] torch.Size([0])"), and with `force_train` a checkpoint of another model leaves random weights.

    The ranks of a machine share the pages of one mapped file, ZeRO-3's partitions are gathered one module at a
    time to be filled, a file that does not fit is a `ConfigError`, and weights that stay random are reported.
    Encoders may be missing: they have their own files.
    """
    return True


def mapped_and_checked(load_checkpoint: Callable[..., int]) -> Callable[..., int]:
    """SAT's load, which reads its file through ours."""
    from sat.training import model_io

    def load(model: nn.Module, args: argparse.Namespace, *rest: Any, **options: Any) -> int:
        module = getattr(model, "module", model)
        assert isinstance(module, nn.Module)
        belongs = in_checkpoint(module)
        names = {name for name, _ in module.named_parameters()}
        state: dict[str, Any] = {}

        def read(file: str, **_: Any) -> dict[str, Any]:
            state.update(read_file(Path(file)))
            return {**state, "module": under_adapters(state["module"], names)}

        def forgive(_: nn.Module, keys: Any) -> None:
            check_names(module, state["module"], args)
            keys.missing_keys[:] = [name for name in keys.missing_keys if belongs(name)]
            if args.force_train and not hasattr(module, "reinit"):
                keys.missing_keys.clear()  # SAT asks every model to initialize them, and only its own can

        hook = module.register_load_state_dict_post_hook(forgive)
        try:
            with gathered_loading(module), replaced(model_io, "torch", StandIn(model_io.torch, load=read)):
                iteration = load_checkpoint(model, args, *rest, **options)
        except AssertionError as error:  # SAT's, for names of the model that the file has not
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

    return load
