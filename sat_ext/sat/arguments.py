"""SAT's arguments from `--base` YAML files, and the process group. A flag on the command line beats the YAML."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import deepspeed
import torch
from sat import arguments as sat_arguments

from sat_ext.config import convert, plain, read_yaml, reject_unknown_keys
from sat_ext.errors import ConfigError
from sat_ext.recipe import HELD_OUT, LISTS, nothing_to_train_on, paths_of, weights_of
from sat_ext.sat import peers
from sat_ext.sat.section import TWICE, check_keys, check_section
from sat_ext.sat.settings import settings_of
from sat_ext.zero import precision


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments for `training_main`: SAT's own, with the sections of the YAML. Raises `ConfigError`."""
    parser = argparse.ArgumentParser(
        description="Train a video diffusion model on images and videos together, with SAT and DeepSpeed.",
        allow_abbrev=False,
    )
    parser.add_argument("--base", nargs="+", required=True, metavar="YAML", help="merged from left to right")
    parser.add_argument("--device", type=int, default=-1, help=argparse.SUPPRESS)
    sat_arguments.add_training_args(parser)
    sat_arguments.add_evaluation_args(parser)
    sat_arguments.add_data_args(parser)
    deepspeed.add_config_arguments(parser)
    _add_own(parser)
    for action in parser._actions:
        if action.help and "%(" not in action.help:  # SAT's have lone percent signs, and argparse formats them
            action.help = action.help.replace("%", "%%")
    known, _ = parser.parse_known_args(argv)

    config = read_yaml(known.base)
    for name in ("model", "data", "deepspeed"):
        if not config.get(name):
            raise ConfigError(f"--base: no '{name}' section in {', '.join(known.base)}; add a file of configs/.")
    settings = config.get("args") or {}
    reject_unknown_keys(settings, [k for k in vars(known) if k not in ("base", "deepspeed_config")], "args")
    settings = _typed(settings, parser)
    # argparse fills in a default only if the namespace has no value yet: so the YAML beats defaults, not flags
    args = parser.parse_args(argv, argparse.Namespace(**settings))
    words = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    explicit = {action.dest for action in parser._actions if words & set(action.option_strings)}
    args.model_config, args.data_config = config["model"], config["data"]
    reject_unknown_keys(args.data_config, ("target", "params"), "data")
    if not args.data_config.get("target"):
        raise ConfigError("data.target: missing; add 'target: sat_ext.JointImageVideoDataset'.")
    args.deepspeed_config = config["deepspeed"]
    check_keys(args.deepspeed_config, {k: v for k, v in settings.items() if k not in explicit})
    _fill_in(args, explicit)
    _check(args)
    check_section(args.deepspeed_config, args.world_size, checkpoints_activations=False)
    flags = {name: getattr(args, name) for name in explicit & set(vars(known)) - {"base"}}
    args.resolved_config = {**config, "args": {**settings, **flags}}
    return args


def _add_own(parser: argparse.ArgumentParser) -> None:
    """The flags of `Settings`; their defaults are its own."""
    group = parser.add_argument_group("sat_ext")
    group.add_argument("--checkpoint", choices=["weights", "full"], help="what a checkpoint holds")
    group.add_argument("--keep-last", type=int, help="how many of the newest full checkpoints stay")
    group.add_argument("--stop-after-bad-steps", type=int, help="bad steps in a row that end a run")
    group.add_argument("--timeout-minutes", type=float, help="how long a rank waits for another")
    group.add_argument("--deterministic", action="store_true", default=None, help="use only reproducible kernels")
    group.add_argument("--gradient-norms", action="store_true", default=None, help="log each kind's gradient")
    group.add_argument("--evaluate-ema", action="store_true", default=None, help="evaluate averaged weights")
    group.add_argument("--without-fixes", nargs="*", metavar="NAME", help="repairs of SAT not to make")


def _typed(settings: dict[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The YAML's `args` in the types that the flags of the same names have. Raises `ConfigError`."""
    typed = dict(settings)
    for action in parser._actions:
        value = settings.get(action.dest)
        if value is None or action.dest.startswith("iterable_dataset"):
            continue
        kind: Any = bool if action.nargs == 0 else action.type or str
        if action.nargs in ("+", "*"):
            kind = list[kind]
        typed[action.dest] = convert(kind, value, f"args.{action.dest}")
        if action.choices and typed[action.dest] not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise ConfigError(f"args.{action.dest}: {value!r} is not one of {choices}.")
    if settings.get("iterable_dataset") not in (None, "custom"):
        raise ConfigError(
            f"args.iterable_dataset: {settings['iterable_dataset']!r}; write 'iterable_dataset: custom' and "
            "'iterable_dataset_eval: custom', or leave both out."
        )
    return typed


def _check(args: argparse.Namespace) -> None:
    """Refuse values that SAT would stumble over later. Raises `ConfigError`."""
    settings_of(args)
    for name in ("seed", "batch_size", "gradient_accumulation_steps", "log_interval"):
        if getattr(args, name) < 1:
            raise ConfigError(f"args.{name}: {getattr(args, name)}; use 1 or more.")
    if args.strict_eval:
        raise ConfigError("args.strict_eval: a stream has no last batch; leave it out, eval_iters says how many.")
    if args.eval_interval and not args.valid_data:
        raise ConfigError(
            "args.eval_interval: there is nothing to evaluate on; name folders in args.valid_data, or set "
            f"{HELD_OUT}."
        )
    weights_of(vars(args), args.train_data)
    if args.save:
        try:
            Path(args.save).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"args.save: {args.save} cannot be made ({error.strerror}); name another."
            ) from error


def _fill_in(args: argparse.Namespace, explicit: set[str]) -> None:
    """What SAT expects to be set, from the environment and the DeepSpeed section; flags in `explicit` win."""
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, default)  # DeepSpeed reads them even for a single process
    args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    args.local_rank = int(os.environ["LOCAL_RANK"])
    args.cuda = torch.cuda.is_available()
    args.device = args.local_rank if args.cuda else "cpu"
    if not args.cuda:
        args.distributed_backend = "gloo"
    args.model_parallel_size, args.num_layers = 1, 1  # num_layers: DeepSpeed's activation checkpointing asks
    args.deepspeed, args.deepspeed_activation_checkpointing = True, False

    ds = args.deepspeed_config
    args.fp16, args.bf16 = precision(ds)
    optimizer = ds["optimizer"] = {"type": "AdamW", **(ds.get("optimizer") or {})}
    optimizer["params"] = optimizer.get("params") or {}
    for name, (*place, key) in TWICE.items():  # a flag beats both places, and the deepspeed section `args`
        section = reduce(dict.__getitem__, place, ds)
        if name in explicit or key not in section:
            section[key] = getattr(args, name)
        setattr(args, name, section[key])
    # SAT saves no state of its random tracker, and fails when it looks for it; our draws follow from the step
    args.no_load_rng = True

    fill_in_lists(args)
    if args.train_iters is None:
        raise ConfigError("args.train_iters: missing; say how many optimizer steps to train.")
    args.iterable_dataset = args.iterable_dataset or "custom"
    args.iterable_dataset_eval = args.iterable_dataset_eval or args.iterable_dataset
    args.split = "1,0,0"  # SAT cannot split a stream
    args.summary_dir = args.summary_dir or args.save or ""


def fill_in_lists(args: argparse.Namespace) -> None:
    """An entry for `data.params.sources` and `held_out`, and None for an empty list, because SAT builds a data set
    for each entry and divides by their number. Raises `ConfigError`."""
    for name in LISTS:
        setattr(args, name, paths_of(vars(args), name) or None)
    params = plain(getattr(args, "data_config", None)).get("params") or {}
    if not args.train_data and params.get("sources"):
        args.train_data = ["data.params.sources"]
    if not args.valid_data and params.get("held_out"):
        args.valid_data = [HELD_OUT]
    if not args.train_data:
        raise nothing_to_train_on()


def initialize(args: argparse.Namespace) -> None:
    """Start the process group and seed every random number generator, as SAT does."""
    sat_arguments.initialize_distributed(args)
    peers.begin()
    sat_arguments.set_random_seed(args.seed)
