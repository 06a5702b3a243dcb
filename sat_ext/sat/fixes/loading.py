"""Weights out of a checkpoint: without running its code, without a copy per rank, and into ZeRO-3's partitions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sat.helpers import print_rank0
from torch import nn

from sat_ext.checkpoint.reading import RNG_STATE_TYPES, read_file, under_adapters
from sat_ext.errors import ConfigError
from sat_ext.sat.fixes.saving import in_checkpoint
from sat_ext.sat.fixes.standin import StandIn
from sat_ext.sat.run import run_of

LORA_WEIGHTS = (".matrix_", ".lora_")  # SAT's and peft's


def resume(args: argparse.Namespace) -> bool:
    """Symptom: torch >= 2.6 refuses SAT's checkpoints ("Weights only load failed"): they hold a NumPy RNG state.

    Allows exactly the types that this state is made of; nothing else in a checkpoint can run code.
    """
    torch.serialization.add_safe_globals(RNG_STATE_TYPES)
    return True


def load(args: argparse.Namespace) -> bool:
    """Symptom: every rank reads the whole checkpoint into memory of its own, under ZeRO-3 no weight fits ("size
    mismatch [...] torch.Size([0])"), and with `force_train` a checkpoint of another model leaves random weights.

    The ranks of a machine share the pages of one mapped file, ZeRO-3's partitions are gathered one module at a
    time to be filled, a file that does not fit is a `ConfigError`, and weights that stay random are told. Encoders
    are not missed: they have files of their own.
    """
    from sat.training import deepspeed_training, model_io

    original = deepspeed_training.load_checkpoint
    state: dict[str, Any] = {}
    names: set[str] = set()  # of the model that is being filled

    def read(file: str, **_: Any) -> dict[str, Any]:
        state.clear()
        state.update(read_file(Path(file)))
        return {**state, "module": under_adapters(state["module"], names)}

    def load_checkpoint(model: nn.Module, args: argparse.Namespace, *rest: Any, **options: Any) -> int:
        module = getattr(model, "module", model)
        assert isinstance(module, nn.Module)
        belongs = in_checkpoint(module)
        names.clear()
        names.update(name for name, _ in module.named_parameters())

        def forgive(_: nn.Module, keys: Any) -> None:
            check_names(module, state["module"], args)
            keys.missing_keys[:] = [name for name in keys.missing_keys if belongs(name)]
            if args.force_train and not hasattr(module, "reinit"):
                keys.missing_keys.clear()  # SAT asks every model to initialize them, and only its own can

        hook = module.register_load_state_dict_post_hook(forgive)
        try:
            with gathered_loading(module):
                iteration: int = original(model, args, *rest, **options)
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
        state.clear()
        return iteration

    model_io.torch = StandIn(model_io.torch, load=read)
    deepspeed_training.load_checkpoint = load_checkpoint
    return True


def lacking(module: nn.Module, weights: Collection[str]) -> tuple[list[str], list[str]]:
    """The parameters of `module` that belong in a checkpoint, LoRA's own aside, and those that `weights` lacks.

    A layer under LoRA keeps its base weights under a name of its own, and takes them from a file without it too.
    """
    belongs = in_checkpoint(module)
    wanted = [
        n for n, _ in module.named_parameters() if belongs(n) and not any(mark in n for mark in LORA_WEIGHTS)
    ]
    plain = {n: n.replace(".original.", ".").replace(".base_layer.", ".") for n in wanted}
    return wanted, [n for n in wanted if n not in weights and plain[n] not in weights]


def check_names(module: nn.Module, weights: Collection[str], args: argparse.Namespace) -> None:
    """Tell of weights of the network that a file lacks, which stay random. Raises `ConfigError` if it has none."""
    wanted, missing = lacking(module, weights)
    if wanted and len(missing) == len(wanted):
        raise ConfigError(
            f"args.load: {args.load} is of another model than the YAML's: it has none of the {len(wanted)} "
            f"weights of the network (first: {missing[0]}); name a checkpoint of this model."
        )
    if missing:
        print_rank0(
            f"warning: {len(missing)} of the network's {len(wanted)} weights are not in {args.load} and keep "
            f"their initial values (first: {missing[0]}).",
            level="WARNING",
        )


def lacks(args: argparse.Namespace, what: str) -> ConfigError:
    """The error of a checkpoint to begin from that does not fill the model, where nothing allows it."""
    return ConfigError(
        f"args.load: {args.load} lacks weights of the YAML's model ({what}); name a checkpoint of this model, or "
        "begin with random ones there by 'force_train: true'."
    )


@contextmanager
def gathered_loading(module: nn.Module) -> Iterator[None]:
    """Inside, `module.load_state_dict` fills parameters that ZeRO-3 has partitioned, one submodule at a time.

    Every rank must take part with the same state. The first rank's values are split up among all.
    """
    if not any(hasattr(p, "ds_id") for p in module.parameters()):
        yield
        return
    parts = list(module.modules())
    for part in parts:
        part.__dict__["_load_from_state_dict"] = _gathered(part, part._load_from_state_dict)
    try:
        yield
    finally:
        for part in parts:
            del part.__dict__["_load_from_state_dict"]


def _gathered(part: nn.Module, fill: Callable[..., None]) -> Callable[..., None]:
    """`fill` with the parameters of `part` itself whole; one of its children may be filled by its parent's."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    def load_from_state_dict(state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        parameters = [p for n, p in part._parameters.items() if p is not None and prefix + n in state_dict]
        with GatheredParameters(parameters, modifier_rank=0, enabled=bool(parameters)):
            fill(state_dict, prefix, *rest)

    return load_from_state_dict
