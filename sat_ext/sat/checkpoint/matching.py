"""Which weights of a model a checkpoint holds, and whether one is of this model."""

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

from sat.helpers import print_rank0
from torch import Tensor, nn

from sat_ext.checkpoint.layout import MANIFEST_NAME, WEIGHTS_NAME
from sat_ext.checkpoint.reading import read_file, read_weights
from sat_ext.errors import ConfigError
from sat_ext.sat.run import RunState, run_of

ENCODERS = ("conditioner.", "first_stage_model.")  # of CogVideo's engine
START_OVER = ", or start over with 'mode: finetune'"
LORA_WEIGHTS = (".matrix_", ".lora_")  # SAT's and peft's


def is_trained(parameter: Tensor) -> bool:
    """Whether training changes a parameter: CogVideo freezes some by a learning rate of 0."""
    return parameter.requires_grad and getattr(parameter, "lr_scale", 1) != 0


def in_checkpoint(module: nn.Module) -> Callable[[str], bool]:
    """Whether a checkpoint of `module`, our engine or CogVideo's, holds the weight of a given name. It leaves out
    what the YAML alone restores: CogVideo's frozen T5 and autoencoder, which have their own files."""
    is_fixed = getattr(module, "is_fixed", None)
    if is_fixed is not None:
        return lambda name: not is_fixed(name)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return lambda name: name in trained or not name.startswith(ENCODERS)


def lacking(module: nn.Module, weights: Collection[str]) -> tuple[list[str], list[str]]:
    """Which parameters of `module` a checkpoint holds, except LoRA's own, and which of them `weights` lacks."""
    belongs = in_checkpoint(module)
    expected = [n for n, _ in module.named_parameters() if belongs(n) and not any(m in n for m in LORA_WEIGHTS)]
    # a layer under LoRA renames its base weights, and also takes them from a file without LoRA
    plain = {n: n.replace(".original.", ".").replace(".base_layer.", ".") for n in expected}
    return expected, [n for n in expected if n not in weights and plain[n] not in weights]


def check_names(module: nn.Module, weights: Collection[str], args: argparse.Namespace) -> None:
    """Warn of weights of the network that a file lacks, which stay random. Raises `ConfigError` if it has none."""
    expected, missing = lacking(module, weights)
    if expected and len(missing) == len(expected):
        raise ConfigError(
            f"args.load: {args.load} is of another model than the YAML's: it has none of the {len(expected)} "
            f"weights of the network (first: {missing[0]}); name a checkpoint of this model."
        )
    if missing:
        print_rank0(
            f"warning: {len(missing)} of the network's {len(expected)} weights are not in {args.load} and keep "
            f"their initial values (first: {missing[0]}).",
            level="WARNING",
        )


def lacks(args: argparse.Namespace, what: str) -> ConfigError:
    """The error for a checkpoint to start from that does not fill the model, without `force_train`."""
    return ConfigError(
        f"args.load: {args.load} lacks weights of the YAML's model ({what}); name a checkpoint of this model, or "
        "allow random ones there with 'force_train: true'."
    )


def check_fit(model: nn.Module, weights: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> None:
    """Raise `ConfigError` unless the names that the checkpoint itself holds, and all shapes, are the model's."""
    # the tensors of ZeRO-3's partitions, and of swapped or quantized weights, do not have the weight's shape
    shapes = {n: getattr(p, "ds_shape", getattr(p, "whole_shape", p.shape)) for n, p in model.named_parameters()}
    shapes |= {n: b.shape for n, b in model.named_buffers()}
    # SAT's LoRA also takes base weights from a file without LoRA (`LoraLinear` in lora2.py)
    shapes |= {n.replace(".original.", "."): s for n, s in shapes.items()}
    if foreign := [n for n in own if n not in shapes]:
        what = f"{len(foreign)} of its {len(own)} weights are not in this one (first: {foreign[0]})"
        raise _other_model(file, what)
    for name, value in weights.items():
        if name in shapes and tuple(value.shape) != tuple(shapes[name]):
            what = f"{name} is {tuple(value.shape)} there, and {tuple(shapes[name])} in this one"
            raise _other_model(file, what)


def check_whole(model: nn.Module, weights: dict[str, Tensor], args: argparse.Namespace, file: Path) -> None:
    """Raise `ConfigError` if weights of the model would stay random, unless `force_train` allows it."""
    run, (expected, missing) = run_of(args), lacking(model, weights)
    if not missing:
        return
    if run.resumed is None:
        if not getattr(args, "force_train", False):
            raise lacks(args, f"{len(missing)} of {len(expected)}, first: {missing[0]}")
        check_names(model, weights, args)
    elif run.base is None:
        what = f"it lacks {len(missing)} of this one's {len(expected)} weights (first: {missing[0]})"
        raise _other_model(file, what, START_OVER)
    else:
        raise ConfigError(
            f"{file.with_name(MANIFEST_NAME)}: neither the checkpoint nor its 'base', {run.base.path}, has "
            f"{len(missing)} of this model's {len(expected)} weights (first: {missing[0]}); write the folder of "
            "the run's base weights there, or name the YAMLs that the run was started with."
        )


def check_trained(model: nn.Module, run: RunState) -> None:
    """Raise `ConfigError` if the checkpoint that is resumed lacks a weight that this run trains."""
    if run.resumed is None:  # a new run, which needs no base if it trains, and therefore saves, all of its weights
        assert run.base is not None
        trained = {n for n, p in model.named_parameters() if is_trained(p)} | {n for n, _ in model.named_buffers()}
        if read_weights(Path(run.base.path), run.base.iteration)[0].keys() <= trained:
            run.base = None
        return
    assert run.folder is not None
    file = run.folder / WEIGHTS_NAME
    own = read_file(file)["module"]
    if missing := [n for n, p in model.named_parameters() if is_trained(p) and n not in own]:
        what = f"it lacks {len(missing)} weights that this run trains (first: {missing[0]})"
        raise _other_model(file, what, START_OVER)


def _other_model(file: Path, what: str, also: str = "") -> ConfigError:
    return ConfigError(
        f"{file}: a checkpoint of another model: {what}; name the YAMLs that the run was started with{also}."
    )
