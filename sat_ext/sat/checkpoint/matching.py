"""Which weights of a model a checkpoint holds, and whether one is of this model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

from sat.helpers import print_rank0
from torch import Tensor, nn

from sat_ext.checkpoint.layout import MANIFEST_NAME, find_weights
from sat_ext.checkpoint.reading import read_file, read_weights
from sat_ext.errors import ConfigError
from sat_ext.sat.run import RunState, run_of

ENCODERS = ("conditioner.", "first_stage_model.")  # of CogVideo's engine
LORA_WEIGHTS = (".matrix_", ".lora_")  # SAT's and peft's


def is_trained(parameter: Tensor) -> bool:
    """Whether training changes a parameter: CogVideo freezes some by a learning rate of 0."""
    return parameter.requires_grad and getattr(parameter, "lr_scale", 1) != 0


def in_checkpoint(module: nn.Module) -> Callable[[str], bool]:
    """Whether a checkpoint of `module`, ours or CogVideo's engine, holds the weight of a name.

    It need not hold what the YAML alone gives back: CogVideo's frozen T5 and autoencoder have files of their own.
    """
    is_fixed = getattr(module, "is_fixed", None)
    if is_fixed is not None:
        return lambda name: not is_fixed(name)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return lambda name: name in trained or not name.startswith(ENCODERS)


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


def check_fit(model: nn.Module, weights: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> None:
    """Raise `ConfigError` unless the names that the checkpoint itself holds, and all shapes, are the model's."""
    # ZeRO-3's partitions, and weights that are swapped or quantized, stand for others
    shapes = {n: getattr(p, "ds_shape", getattr(p, "whole_shape", p.shape)) for n, p in model.named_parameters()}
    shapes |= {n: b.shape for n, b in model.named_buffers()}
    # a layer under SAT's LoRA takes its base weights from a file without LoRA too (`LoraLinear` in lora2.py)
    shapes |= {n.replace(".original.", "."): s for n, s in shapes.items()}
    if foreign := [n for n in own if n not in shapes]:
        raise ConfigError(
            f"{file}: a checkpoint of another model: {len(foreign)} of its {len(own)} weights are not in this one "
            f"(first: {foreign[0]}); name the YAMLs that the run was started with."
        )
    for name, value in weights.items():
        if name in shapes and tuple(value.shape) != tuple(shapes[name]):
            raise ConfigError(
                f"{file}: a checkpoint of another model: {name} is {tuple(value.shape)} there, and "
                f"{tuple(shapes[name])} in this one; name the YAMLs that the run was started with."
            )


def check_whole(model: nn.Module, weights: dict[str, Tensor], args: argparse.Namespace, file: Path) -> None:
    """Raise `ConfigError` where weights of the model would stay random, unless `force_train` allows it."""
    run, (wanted, missing) = run_of(args), lacking(model, weights)
    if not missing:
        return
    if run.resumed is None:
        if not getattr(args, "force_train", False):
            raise lacks(args, f"{len(missing)} of {len(wanted)}, first: {missing[0]}")
        check_names(model, weights, args)
    elif run.base is None:
        raise ConfigError(
            f"{file}: a checkpoint of another model: it lacks {len(missing)} of this one's {len(wanted)} weights "
            f"(first: {missing[0]}); name the YAMLs that the run was started with, or start anew with "
            "'mode: finetune'."
        )
    else:
        raise ConfigError(
            f"{file.with_name(MANIFEST_NAME)}: neither the checkpoint nor its 'base', {run.base.path}, has "
            f"{len(missing)} of this model's {len(wanted)} weights (first: {missing[0]}); write the folder of the "
            "run's base weights there, or name the YAMLs that the run was started with."
        )


def check_trained(model: nn.Module, run: RunState) -> None:
    """Raise `ConfigError` where the checkpoint that is resumed lacks a weight that this run trains.

    Of a run that begins: its base is not needed later when all of its weights are trained, and saved.
    """
    if run.resumed is None:
        assert run.base is not None
        trained = {n for n, p in model.named_parameters() if is_trained(p)} | {n for n, _ in model.named_buffers()}
        if read_weights(Path(run.base.path), run.base.iteration)[0].keys() <= trained:
            run.base = None
        return
    assert run.folder is not None
    file = find_weights(run.folder.parent, int(run.folder.name))
    own = read_file(file)["module"]
    if missing := [n for n, p in model.named_parameters() if is_trained(p) and n not in own]:
        raise ConfigError(
            f"{file}: a checkpoint of another model: it lacks {len(missing)} weights that this run trains (first: "
            f"{missing[0]}); name the YAMLs that the run was started with, or start anew with 'mode: finetune'."
        )
