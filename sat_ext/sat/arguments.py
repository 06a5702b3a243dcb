"""SAT's arguments from `--base` YAML files, and the process group. A flag on the command line beats the YAML."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sat import arguments as sat_arguments
from yaml import YAMLError

from sat_ext.config import reject_unknown_keys
from sat_ext.errors import ConfigError

SECTIONS = ("args", "model", "data", "deepspeed")


def read_yaml(paths: Sequence[str]) -> dict[str, Any]:
    """Merge the YAML files, the later over the earlier, into plain dicts and lists.

    Raises `ConfigError` when a file is missing, is not YAML, or has an unknown section.
    """
    if not paths:
        raise ConfigError(
            "--base: no YAML was given; for example --base configs/model/tiny.yaml configs/data/demo.yaml."
        )
    parts = []
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"--base: there is no file {path} (looked from {Path.cwd()}).")
        try:
            part = OmegaConf.load(path)
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not OmegaConf.is_dict(part):
            raise ConfigError(f"{path}: expected sections ({', '.join(SECTIONS)}), got {type(part).__name__}.")
        reject_unknown_keys([str(k) for k in part], SECTIONS, path)
        parts.append(part)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*parts), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"--base: {' '.join(str(error).split())}") from error
    assert isinstance(merged, dict)
    return {str(k): v for k, v in merged.items()}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments for `training_main`: SAT's own, with `model_config`, `data_config` and `deepspeed_config`.

    Raises `ConfigError` for an unknown key and for a missing section.
    """
    parser = argparse.ArgumentParser(
        description="Train a video diffusion model on images and videos together, with SAT and DeepSpeed."
    )
    parser.add_argument("--base", nargs="+", required=True, metavar="YAML", help="merged from left to right")
    parser.add_argument("--device", type=int, default=-1, help=argparse.SUPPRESS)
    sat_arguments.add_training_args(parser)
    sat_arguments.add_evaluation_args(parser)
    sat_arguments.add_data_args(parser)
    deepspeed.add_config_arguments(parser)
    known, _ = parser.parse_known_args(argv)

    config = read_yaml(known.base)
    for section in ("model", "data", "deepspeed"):
        if not config.get(section):
            raise ConfigError(
                f"--base: no '{section}' section in {', '.join(known.base)}; add a file of configs/."
            )
    settings = config.get("args") or {}
    reject_unknown_keys(settings, [k for k in vars(known) if k not in ("base", "deepspeed_config")], "args")
    # argparse fills in a default only where the namespace has no value yet: so YAML lies below the flags
    args = parser.parse_args(argv, argparse.Namespace(**settings))
    args.resolved_config = config
    args.model_config, args.data_config = config["model"], config["data"]
    reject_unknown_keys(args.data_config, ("target", "params"), "data")
    args.deepspeed_config = config["deepspeed"]
    _fill_in(args)
    return args


def _fill_in(args: argparse.Namespace) -> None:
    """What SAT expects to be set, from the environment and the DeepSpeed section."""
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
    args.fp16 = bool(ds.get("fp16", {}).get("enabled"))
    args.bf16 = bool(ds.get("bf16", {}).get("enabled"))
    args.batch_size = ds.setdefault("train_micro_batch_size_per_gpu", args.batch_size)
    args.gradient_accumulation_steps = ds.setdefault(
        "gradient_accumulation_steps", args.gradient_accumulation_steps
    )
    optimizer = ds.get("optimizer", {}).setdefault("params", {})
    args.lr = optimizer.setdefault("lr", args.lr)
    args.weight_decay = optimizer.setdefault("weight_decay", args.weight_decay)

    if not args.train_data and (args.data_config.get("params") or {}).get("sources"):
        args.train_data = ["data.params.sources"]  # SAT builds a data set for each entry, and none without any
    if not args.train_data:
        raise ConfigError(
            "args.train_data: nothing to train on; name a folder or table, or set data.params.sources."
        )
    if args.train_iters is None:
        raise ConfigError("args.train_iters: missing; say how many optimizer steps to train.")
    args.iterable_dataset = args.iterable_dataset or "custom"
    args.iterable_dataset_eval = args.iterable_dataset_eval or args.iterable_dataset
    args.split = "1,0,0" if args.iterable_dataset else args.split  # SAT cannot split a stream
    args.summary_dir = args.summary_dir or args.save or ""


def initialize(args: argparse.Namespace) -> None:
    """Start the process group and seed every random number generator, as SAT does."""
    sat_arguments.initialize_distributed(args)
    sat_arguments.set_random_seed(args.seed)
