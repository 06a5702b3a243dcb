"""What the YAML files of a run (`--base`) say of its data; without SAT, which takes long to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer

from sat_ext.cogvideox import SequenceShape
from sat_ext.config import convert, load, read_yaml, reject_unknown_keys
from sat_ext.data.params import DataConfig, name_sources, sources_of
from sat_ext.data.sources import SourceConfig
from sat_ext.doubts import doubts
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket
from sat_ext.zero import precision, training_dtype

# `--base a.yaml b.yaml c.yaml`: an option takes one value, so the others arrive as arguments.
BaseOption = Annotated[
    list[str], typer.Option("--base", metavar="YAML...", help="YAML files of the run, merged from left to right")
]
MoreYaml = Annotated[list[str] | None, typer.Argument(hidden=True)]

# The data classes whose batches these subcommands can make.
TARGETS = ("sat_ext.JointImageVideoDataset", "sat_ext.FirstFrameDataset")
# SAT's own defaults (sat/arguments.py, add_training_args and add_data_args, 0.4.12).
SAT_DEFAULTS = {"batch_size": 4, "gradient_accumulation_steps": 1, "num_workers": 1}


@dataclass(frozen=True, kw_only=True)
class Base:
    """The data side of a run.

    `sources` are trained on, `held_out` are those of `args.valid_data` and `test_data`.
    `micro_batch` is in samples of the costliest bucket per rank and step, `batch_sizes` in samples per rank and
    step by bucket; `model` is the YAML's own section (empty where there is none) and `shape` what follows from
    it. `doubts` are sentences about what will hardly train as it is meant. `train_iters` counts optimizer steps,
    each of `accumulation` steps of the data; None where not set.
    """

    data: DataConfig
    sources: tuple[SourceConfig, ...]
    held_out: tuple[SourceConfig, ...]
    model: dict[str, Any]
    buckets: tuple[Bucket, ...]
    batch_sizes: dict[Bucket, int]
    shape: SequenceShape
    micro_batch: int
    accumulation: int
    num_workers: int
    dtype: torch.dtype
    doubts: tuple[str, ...]
    train_iters: int | None


def load_base(paths: Sequence[str]) -> Base:
    """Merge the YAML files as `train_video.py --base` does, the later over the earlier, and read their data side.

    Needs a `data` section; `model`, `deepspeed` and `args` give defaults where they are left out. Raises
    `ConfigError`, one sentence, for a file that is missing or not YAML, for an unknown key of the data or the
    model, and where there is nothing to train on.
    """
    config = read_yaml(paths)
    section, model, args, deepspeed = (_section(config, n) for n in ("data", "model", "args", "deepspeed"))
    if not section:
        raise ConfigError(f"--base: no 'data' section in {', '.join(paths)}; add a file of configs/data/.")
    reject_unknown_keys(section, ("target", "params"), "data")
    target = section.get("target", TARGETS[0])
    if target not in TARGETS:
        raise ConfigError(
            f"data.target: {target!r} is not a class of sat_ext's; this command reads {' and '.join(TARGETS)}."
        )
    data = load(DataConfig, section.get("params") or {}, "data.params")
    sources = _sources(data, args)
    if target == TARGETS[1]:
        sources = tuple(replace(s, sampler="first_frame") for s in sources)
    name_sources(sources, "data.params.sources" if data.sources else "args.train_data")
    micro_batch = _count("batch_size", args, deepspeed, "train_micro_batch_size_per_gpu")
    engine, buckets = engine_of(model), data.make_buckets()
    shape = engine.sequence_shape()
    engine.check(buckets)
    return Base(
        data=data,
        sources=sources,
        held_out=tuple(sources_of(_paths(args, "valid_data"), None) + sources_of(_paths(args, "test_data"), None)),
        model=model,
        buckets=buckets,
        batch_sizes=data.batch_sizes(buckets, largest=micro_batch, shape=shape),
        shape=shape,
        micro_batch=micro_batch,
        accumulation=_count("gradient_accumulation_steps", args, deepspeed, "gradient_accumulation_steps"),
        num_workers=_count("num_workers", args, least=0),
        dtype=training_dtype(*precision(deepspeed)),
        doubts=tuple(doubts(engine, deepspeed, args)),
        train_iters=convert(int | None, args.get("train_iters"), "args.train_iters"),
    )


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{name}: expected a mapping of keys, got {section!r}.")
    return section


def _sources(data: DataConfig, args: Mapping[str, Any]) -> tuple[SourceConfig, ...]:
    """`data.params.sources`, or one source for each entry of SAT's `train_data`."""
    if data.sources:
        return data.sources
    paths = _paths(args, "train_data")
    weights = convert(list[float] | None, args.get("train_data_weights"), "args.train_data_weights")
    if not paths:
        raise ConfigError(
            "args.train_data: nothing to train on; name a folder or table, or set data.params.sources."
        )
    if weights is not None and len(weights) != len(paths):
        raise ConfigError(
            f"args.train_data_weights: {len(weights)} weights for {len(paths)} entries of args.train_data; "
            "give one for each."
        )
    return tuple(sources_of(paths, weights))


def _paths(args: Mapping[str, Any], name: str) -> list[str]:
    return list(convert(list[str], args.get(name) or [], f"args.{name}"))


def _count(
    name: str, args: Mapping[str, Any], deepspeed: Mapping[str, Any] | None = None, key: str = "", least: int = 1
) -> int:
    """A whole number of the deepspeed section (`key`) where it is there, else of `args`, else SAT's default."""
    if deepspeed is not None and key in deepspeed:
        where, value = f"deepspeed.{key}", deepspeed[key]
    else:
        where, value = f"args.{name}", args.get(name, SAT_DEFAULTS[name])
    count = convert(int, value, where)
    if count < least:
        raise ConfigError(f"{where}: {count}; give {least} or more.")
    return int(count)
