"""What SAT's `create_dataset_function` must return: one joint stream of finished batches.

SAT calls the function once for each entry of `train_data`, then for each of `valid_data` and `test_data`, and
draws among the entries of one list with a seed that differs from rank to rank. Ranks must not diverge, so all
entries of a list share one stream: whichever entry SAT draws, the next batch of the schedule comes.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from math import ceil
from pathlib import Path
from types import MethodType
from typing import Any

from rich.progress import track
from sat import mpu
from sat.helpers import print_rank0
from torch.utils.data import get_worker_info
from webdataset import DataPipeline

from sat_ext.data.held_out import HeldOut
from sat_ext.data.index import Index, build_index, clip_lengths, longest_is_rare
from sat_ext.data.stream import JointStream
from sat_ext.errors import ConfigError
from sat_ext.latents.reader import open_reader
from sat_ext.recipe import LISTS, Recipe
from sat_ext.sat import hooks
from sat_ext.sat.broadcast import require_everywhere, share_from_first_rank
from sat_ext.sat.checkpoint.data_state import continue_order, first_step, samples_used
from sat_ext.sat.probing import probe_on_all_ranks
from sat_ext.sat.registry import dataset_registry
from sat_ext.sat.run import recipe_in, run_of
from sat_ext.sat.shared_memory import check_shared_memory

MANY_FILES = 500  # some seconds of probing
MIXED = 0.9  # of the updates: fewer that hold every source are worth a warning


class SharedStream(DataPipeline):
    """One entry of a SAT data list. All entries of the list hold the same `JointStream` and iterator."""

    def __init__(self, stream: JointStream | HeldOut, args: argparse.Namespace, shared: list[Any]) -> None:
        super().__init__()
        self.stream, self.args, self._shared = stream, args, shared
        self.rank = mpu.get_data_parallel_rank()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The list's one iterator; a new one when every entry has asked for it once."""
        if not self._shared or self in self._shared[1]:
            self._shared[:] = [self._batches(), []]
        self._shared[1].append(self)
        return self._shared[0]

    def _batches(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        place: dict[str, int] = {"rank": self.rank}
        if info is not None:
            place |= {"worker": info.id, "workers": info.num_workers}
        if isinstance(self.stream, JointStream):
            # asked for here, not when SAT builds the data set: the checkpoint is loaded in between
            place["start"] = first_step(self.args)
        return self.stream.batches(**place)


class _Entry:
    """A class method that puts our hooks in place when a script reads it, just before it calls `training_main`:
    CogVideo's script calls nothing of ours earlier."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        hooks.enter()
        return MethodType(self.method, owner)


@dataset_registry.register
class JointImageVideoDataset:
    """YAML target `sat_ext.JointImageVideoDataset`: stills, clips and first frames in one training run."""

    target = "sat_ext.JointImageVideoDataset"

    @_Entry
    def create_dataset_function(cls, path: str, args: argparse.Namespace, **params: Any) -> SharedStream:
        """For SAT: the data set of `path`, one entry of `args.train_data`, `valid_data` or `test_data`.

        `params` are `data.params` of the YAML (see `DataConfig`). Raises `ConfigError` and `DataError`.
        """
        recipe = recipe_in(args, {"target": cls.target, "params": params})
        assert recipe is not None
        split = _next_split(args)
        _require_iterable(args, split)
        entries = run_of(args).streams.setdefault(split, [])
        if not entries:
            entries += [_shared_stream(args, recipe, split), []]
        return SharedStream(entries[0], args, entries[1])


@dataset_registry.register
class FirstFrameDataset(JointImageVideoDataset):
    """YAML target `sat_ext.FirstFrameDataset`: the first frame of every clip, and stills as they are."""

    target = "sat_ext.FirstFrameDataset"


def _require_iterable(args: argparse.Namespace, split: str) -> None:
    name = "iterable_dataset" if split == "train_data" else "iterable_dataset_eval"
    if (value := getattr(args, name)) != "custom":
        raise ConfigError(
            f"args.{name}: {value!r} makes SAT stack samples of different shapes; add the two lines "
            "'iterable_dataset: custom' and 'iterable_dataset_eval: custom' under 'args'."
        )


def _shared_stream(args: argparse.Namespace, recipe: Recipe, split: str) -> JointStream | HeldOut:
    """Training's endless stream, or the fixed list of an evaluation."""
    world = mpu.get_data_parallel_world_size()
    if split == "train_data":
        return _stream(args, recipe, split, world=world)
    samples = args.eval_iters * (args.eval_batch_size or args.batch_size)
    held_out = HeldOut(_stream(args, recipe, split, world=1), samples=samples, world=world)
    print_rank0(f"{split}: an evaluation is of {sum(held_out.counts)} samples: {held_out.summary()}")
    return held_out


def _stream(args: argparse.Namespace, recipe: Recipe, split: str, *, world: int) -> JointStream:
    """The stream of one list."""
    engine, data, trains = recipe.engine, recipe.data, split == "train_data"
    engine.check_run(args, recipe.buckets, is_cached=data.cache is not None)
    for sentence in recipe.doubts if trains else ():
        print_rank0(f"warning: {sentence}", level="WARNING")
    sources = recipe.lists[split]
    folders = [data.cache.folder] if data.cache else [s.path for s in sources]  # media, or what is read instead
    require_everywhere(folders, "data.params.cache.folder" if data.cache else f"args.{split}")

    def make() -> tuple[Index, tuple[str, str] | None]:
        index = build_index(sources, data, probing=_with_progress_bar, probe=probe_on_all_ranks)
        return index, longest_is_rare(clip_lengths(index), data)  # which goes through every record

    index, rare = share_from_first_rank(make)
    print_rank0(f"{split}: {index.summary()}")
    if rare:
        print_rank0(f"{split}: warning: {'; '.join(rare)}.")
    largest = recipe.micro_batch if trains else args.eval_batch_size or recipe.micro_batch
    packs = trains and engine.takes_packs
    size = data.step_size(recipe.buckets, largest=largest, shape=recipe.shape, packs=packs)
    reader = None
    if data.cache is not None:
        reader = open_reader(
            data, index, engine.fingerprints(recipe.dtype), draws=trains, conditions=engine.is_conditioned,
            share=share_from_first_rank,
        )  # fmt: skip
    stream = JointStream(
        index, data, size=size, world=world, accumulation=recipe.accumulation,
        dtype=engine.batch_dtype(recipe.dtype, model_parallel=mpu.get_model_parallel_world_size()),
        used=samples_used(args, index, data.seed) if trains else None,
        reader=reader,
    )  # fmt: skip
    if trains:
        continue_order(run_of(args), stream)
    print_rank0(f"{split}: {stream.summary()}")
    if trains and stream.accumulation > 1 and (part := stream.mixed_updates()) < MIXED:
        rarest = min(index.shares.values()) / sum(index.shares.values())
        print_rank0(
            f"{split}: warning: only {part:.0%} of the updates hold every source, as the rarest has a share of "
            f"{rarest:.2g}; with deepspeed.gradient_accumulation_steps of {ceil(1 / rarest)} nearly all do.",
            level="WARNING",
        )
    if reader is None:  # latents take a fiftieth of their pixels
        check_shared_memory(args, stream)
    return stream


def _next_split(args: argparse.Namespace) -> str:
    """Which list SAT is building now: it goes through train, valid and test entries in this order."""
    run = run_of(args)
    calls, run.built = run.built, run.built + 1
    if calls == 0 and hasattr(args, "experiment_name"):
        args.experiment_name = share_from_first_rank(lambda: _new_name(args))
    for split in LISTS:
        entries = getattr(args, split, None) or []
        if calls < len(entries):
            return split
        calls -= len(entries)
    raise AssertionError("SAT asked for more data sets than args.train_data, valid_data and test_data name")


def _new_name(args: argparse.Namespace) -> str:
    """The run's folder in `args.save`. SAT names it by each rank's own clock, to the minute: another run of that
    minute would share it."""
    name: str = args.experiment_name
    if not args.save or (args.load and args.mode == "pretrain"):
        return name
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(n for n in names if not (Path(args.save) / n).exists())


def _with_progress_bar(outcomes: Iterable[Any], total: int) -> Iterable[Any]:
    return track(outcomes, description="probing files", total=total, disable=total < MANY_FILES)
