"""What the YAML of a run says, read once into one frozen `Recipe`. Imports no SAT, which takes long.

The data class of a training run, the subcommands and the planner start from it, with the same defaults and errors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from sat_ext.cogvideox import SequenceShape
from sat_ext.config import convert, load, read_yaml, reject_unknown_keys
from sat_ext.data.buckets import StepSize
from sat_ext.data.mix import parts_of
from sat_ext.data.params import DataConfig, name_sources, sources_of
from sat_ext.data.sources import SourceConfig
from sat_ext.engines import Engine, engine_of
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket
from sat_ext.zero import precision

# Our data classes, and the sampler that each gives to every source.
TARGETS = {"sat_ext.JointImageVideoDataset": None, "sat_ext.FirstFrameDataset": "first_frame"}
LISTS = ("train_data", "valid_data", "test_data")  # of SAT's args, in the order in which SAT builds them
HELD_OUT = "data.params.held_out"  # the one entry of `valid_data` where a part of the training data is held out
# SAT's own defaults (sat/arguments.py, add_training_args and add_data_args, 0.4.12).
SAT_DEFAULTS = {"batch_size": 4, "gradient_accumulation_steps": 1, "num_workers": 1}
SAT_LR = 1e-4
# A LoRA's step is the learning rate times the factor on its product. The least that CogVideo trains one with: lr
# 5e-4 (the comment at `lr` in sat/configs/sft.yaml: "Between 1E-3 and 5E-4 For Lora and 1E-5 For SFT") times 1/256
# (`r: 256` in sat/configs/cogvideox_5b_i2v_lora.yaml, and alpha 1, the default of sat.model.finetune.lora2).
LEAST_LORA_STEP = 5e-4 / 256


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run.

    `target` names the data class, and `lists` holds the sources of each of `LISTS`. `micro_batch` is in samples of
    the costliest bucket per rank and step. `train_iters` counts optimizer steps (None: not set), each of
    `accumulation` steps of the data. `doubts` are warnings about what trains, but probably not as intended."""

    target: str
    data: DataConfig
    lists: Mapping[str, tuple[SourceConfig, ...]]
    engine: Engine
    deepspeed: Mapping[str, Any]
    micro_batch: int
    accumulation: int
    num_workers: int
    dtype: torch.dtype
    train_iters: int | None
    doubts: tuple[str, ...]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes of batches. Raises `ConfigError`."""
        return self.data.make_buckets()

    @cached_property
    def shape(self) -> SequenceShape:
        """What the cost of a batch follows from. Raises `ConfigError`."""
        return self.engine.sequence_shape()

    @cached_property
    def step_size(self) -> StepSize:
        """How large a rank's steps are; CogVideo's own data class pads every clip to the longest length."""
        buckets, packs = self.buckets, self.engine.takes_packs
        if self.target not in TARGETS:
            buckets, packs = (max(buckets, key=lambda b: b.frames),), False
        return self.data.step_size(buckets, largest=self.micro_batch, shape=self.shape, packs=packs)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """What the run trains on."""
        return self.lists["train_data"]

    @property
    def held_out(self) -> tuple[SourceConfig, ...]:
        """What the run is evaluated on."""
        return self.lists["valid_data"] + self.lists["test_data"]

    def checked(self) -> "Recipe":
        """This recipe, if its data can be read and its model takes them. Raises `ConfigError`."""
        if self.target not in TARGETS:
            raise ConfigError(
                f"data.target: {self.target!r} is not a class of sat_ext's; this command reads "
                f"{' and '.join(TARGETS)}."
            )
        if not self.sources:
            raise nothing_to_train_on()
        name_sources(self.sources, "data.params.sources" if self.data.sources else "args.train_data")
        self.engine.check(self.buckets)
        return self


def read_recipe(paths: Sequence[str]) -> Recipe:
    """The recipe in YAML files, which merge as for `train_video.py --base`, the later over the earlier.

    Needs a `data` section; `model`, `deepspeed` and `args` have defaults. Raises `ConfigError`."""
    return recipe_of(read_yaml(paths), f" in {', '.join(paths)}")


def recipe_of(config: Mapping[str, Any], where: str = "") -> Recipe:
    """The recipe in merged sections. Folders that they name need not be on this machine. Raises `ConfigError`."""
    if not config.get("data"):
        raise ConfigError(f"--base: no 'data' section{where}; add a file of configs/data/.")
    section, deepspeed, args = (_section(config, name) for name in ("data", "deepspeed", "args"))
    reject_unknown_keys(section, ("target", "params"), "data")
    target = section.get("target") or next(iter(TARGETS))
    data = load(DataConfig, section.get("params") or {}, "data.params")
    engine = engine_of(config.get("model"))
    if not engine.takes_packs and "tokens" in data.batch:
        why = "CogVideo's engine takes" if engine.model else "without a 'model' section there is"
        raise ConfigError(
            f"data.params.batch: {data.batch!r} is the size of a pack, and {why} one bucket a step; write "
            "{cost: auto}, or samples per frame count as in {1: 8, 49: 1}."
        )
    fp16, bf16 = precision(deepspeed)
    steps = "gradient_accumulation_steps"
    accumulation = _count(steps, args, deepspeed.get(steps))

    sampler = TARGETS.get(target)
    if data.mix and sampler is not None:
        raise ConfigError(f"data.params.mix: every sample of {target} is a still; use {next(iter(TARGETS))}.")

    def sources(name: str) -> tuple[SourceConfig, ...]:
        trains, splits = name == "train_data", data.held_out is not None
        if splits and name == "valid_data":
            if (given := paths_of(args, name)) not in ([], [HELD_OUT]):
                raise ConfigError(
                    f"args.valid_data: {given[0]!r}, but {HELD_OUT}: {data.held_out} holds out a part of the "
                    "training data; leave one of the two out (valid_data: null)."
                )
            return tuple(replace(s, side="held_out") for s in sources("train_data"))
        found = data.sources if trains and data.sources else _of_list(args, name)
        if sampler is not None:
            found = tuple(replace(s, sampler=sampler) for s in found)
        return tuple(replace(s, side="train") for s in found) if trains and splits else found

    lists = {name: sources(name) for name in LISTS}
    if data.mix:
        lists["train_data"] = parts_of(lists["train_data"], data.mix)
    if any(s.target == "base" for s in lists["train_data"]):
        engine.check_base()
    return Recipe(
        target=target,
        data=data,
        lists=lists,
        engine=engine,
        deepspeed=deepspeed,
        micro_batch=_count("batch_size", args, deepspeed.get("train_micro_batch_size_per_gpu")),
        accumulation=accumulation,
        num_workers=_count("num_workers", args, least=0),
        dtype=torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32,  # in SAT's order
        train_iters=convert(int | None, args.get("train_iters"), "args.train_iters"),
        doubts=tuple(doubts_of(engine, deepspeed, args, accumulation, None if data.makes_packs else data.batch)),
    )


def doubts_of(
    engine: Engine, deepspeed: Mapping[str, Any], args: Mapping[str, Any], accumulation: int,
    batch: Mapping[Any, int] | None = None,
) -> list[str]:  # fmt: skip
    """A sentence for each value that trains without an error, but probably not as intended. `batch` are sizes by
    hand, of one bucket a step."""
    found = []
    given = ((deepspeed.get("optimizer") or {}).get("params") or {}).get("lr")
    lr = float(args.get("lr") or SAT_LR if given is None else given)
    factor, written = engine.lora_scale or (math.inf, "")
    if lr * factor < LEAST_LORA_STEP:
        found.append(
            f"deepspeed.optimizer.params.lr: {lr:g} is a rate for tuning every weight; a LoRA scaled by {written} "
            f"hardly learns at it (lr x scale is {lr * factor:.1e}, and the least that CogVideo trains one with "
            f"is {LEAST_LORA_STEP:.1e}: 5e-4 at 1/256); {engine.lora_remedy}."
        )
    if (doubt := engine.doubt()) is not None:
        found.append(doubt)
    if engine.is_2b and (deepspeed.get("bf16") or {}).get("enabled"):
        found.append(
            "deepspeed.bf16.enabled: true, but CogVideoX-2B was published in fp16; bf16 keeps three bits less; "
            "append configs/train/fp16.yaml."
        )
    clip = deepspeed.get("gradient_clipping")
    by_hand = engine.takes_packs and batch is not None
    if clip and engine.model and accumulation == 1 and (by_hand or not engine.takes_packs):
        cause, remedy = "deepspeed.gradient_accumulation_steps: 1", "set it to 4 or more"
        if by_hand:
            cause, remedy = f"data.params.batch: {batch!r}", "write {cost: auto}"
        found.append(
            f"{cause}, so each update has one source and one bucket; clipped at {clip} "
            "(deepspeed.gradient_clipping), an update of many stills then counts no more than one of a "
            f"single clip; {remedy}, so that updates are mixed."
        )
    return found


def nothing_to_train_on() -> ConfigError:
    """For a run without sources."""
    return ConfigError("args.train_data: nothing to train on; name a folder or table, or set data.params.sources.")


def paths_of(args: Mapping[str, Any], name: str) -> list[str]:
    """One of `LISTS`, which may be left out. Raises `ConfigError`."""
    paths = args.get(name) or []
    if isinstance(paths, str):
        raise ConfigError(f'args.{name}: {paths!r} is a string, not a list; write ["{paths}"].')
    return list(convert(list[str], paths, f"args.{name}"))


def weights_of(args: Mapping[str, Any], paths: Sequence[str]) -> list[float] | None:
    """`args.train_data_weights` of the `paths` of `args.train_data`. Raises `ConfigError`."""
    where = "args.train_data_weights"
    weights: list[float] | None = convert(list[float] | None, args.get("train_data_weights"), where)
    if weights and len(weights) != len(paths):
        entries = f"{len(paths)} entries of args.train_data"
        raise ConfigError(f"{where}: {len(weights)} weights for {entries}; write one for each.")
    return weights or None


def _of_list(args: Mapping[str, Any], name: str) -> tuple[SourceConfig, ...]:
    paths = paths_of(args, name)
    return tuple(sources_of(paths, weights_of(args, paths) if name == "train_data" else None))


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{name}: expected a mapping of keys, got {section!r}.")
    return section


def _count(name: str, args: Mapping[str, Any], deepspeed: Any = None, *, least: int = 1) -> int:
    """DeepSpeed's value, which wins as in SAT, else that of `args`, else SAT's default."""
    where, value = f"args.{name}", args.get(name)
    if deepspeed is not None:
        key = "train_micro_batch_size_per_gpu" if name == "batch_size" else name
        where, value = f"deepspeed.{key}", deepspeed
    count: int = convert(int, SAT_DEFAULTS[name] if value is None else value, where)
    if count < least:
        raise ConfigError(f"{where}: {count}; use {least} or more.")
    return count
