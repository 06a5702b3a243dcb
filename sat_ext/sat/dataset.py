"""What SAT's `create_dataset_function` must return: one joint stream of finished batches.

SAT calls the function once for each entry of `train_data`, then for each of `valid_data` and `test_data`, and
draws among the entries of one list with a seed that differs from rank to rank. Ranks must not diverge, so all
entries of a list share one stream: whichever SAT draws, the next batch of the schedule comes.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from types import MethodType
from typing import Any

from rich.progress import track
from sat import mpu
from sat.helpers import print_rank0
from torch.utils.data import Dataset, get_worker_info
from webdataset import DataPipeline

from sat_ext.data.held_out import HeldOut
from sat_ext.data.index import build_index, clip_lengths, longest_is_rare
from sat_ext.data.stream import JointStream
from sat_ext.errors import ConfigError
from sat_ext.latents.reader import open_reader
from sat_ext.recipe import LISTS, Recipe
from sat_ext.sat import hooks
from sat_ext.sat.broadcast import require_everywhere, share_from_first_rank
from sat_ext.sat.checkpoint.data_state import first_step, samples_used
from sat_ext.sat.registry import dataset_registry
from sat_ext.sat.run import recipe_in, run_of
from sat_ext.sat.settings import settings_of
from sat_ext.sat.shared_memory import check_shared_memory

MANY_FILES = 500  # some seconds of probing


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
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if isinstance(self.stream, HeldOut):
            return self.stream.batches(rank=self.rank, worker=worker, workers=workers)
        # read here, not when SAT builds the data set: the checkpoint is loaded in between
        start = first_step(self.args)
        return self.stream.batches(start=start, rank=self.rank, worker=worker, workers=workers)


class MapStyle(Dataset):
    """The same samples one by one, for SAT's own batching; right only where a batch is one sample.

    Item i is the sample of step i of a schedule of one rank, so shares hold over any run of items.
    """

    def __init__(self, stream: JointStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return sum(cell.records for cell in self.stream.schedule.cells)

    def __getitem__(self, item: int) -> dict[str, Any]:
        batch = self.stream.batch(next(self.stream.schedule.steps(item)), rank=0)
        return {k: v[0] for k, v in batch.items()}


class _Entry:
    """A class method that a script reads just before it calls `training_main`. CogVideo's calls nothing of ours
    earlier, and SAT's `make_loaders` divides by what is in its lists before it calls the method itself."""

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
    def create_dataset_function(cls, path: str, args: argparse.Namespace, **params: Any) -> Any:
        """For SAT: the data set of `path`, one entry of `args.train_data`, `valid_data` or `test_data`.

        `params` are `data.params` of the YAML (see `DataConfig`). Raises `ConfigError` and `DataError`.
        """
        hooks.begin(args)
        recipe = recipe_in(args, {"target": cls.target, "params": params})
        assert recipe is not None
        split = _next_split(args)
        if not _is_stream(args, split):
            return MapStyle(_stream(args, recipe, split, world=1, entry=path))
        entries = run_of(args).streams.setdefault(split, [])
        if not entries:
            entries += [_shared_stream(args, recipe, split), []]
        return SharedStream(entries[0], args, entries[1])


@dataset_registry.register
class FirstFrameDataset(JointImageVideoDataset):
    """YAML target `sat_ext.FirstFrameDataset`: the first frame of every clip, and stills as they are."""

    target = "sat_ext.FirstFrameDataset"


def _shared_stream(args: argparse.Namespace, recipe: Recipe, split: str) -> JointStream | HeldOut:
    """Training's endless stream, or the fixed list of an evaluation."""
    world = mpu.get_data_parallel_world_size()
    if split == "train_data":
        return _stream(args, recipe, split, world=world)
    held_out = HeldOut(
        _stream(args, recipe, split, world=1),
        samples=args.eval_iters * (args.eval_batch_size or args.batch_size), world=world,
    )  # fmt: skip
    print_rank0(f"{split}: an evaluation is of {sum(held_out.counts)} samples: {held_out.summary()}")
    return held_out


def _stream(
    args: argparse.Namespace, recipe: Recipe, split: str, *, world: int, entry: str | None = None
) -> JointStream:
    """The stream of one list; of its `entry` alone, sample by sample, for SAT's own batching."""
    engine, data, trains = recipe.engine, recipe.data, split == "train_data"
    engine.check_run(args, recipe.buckets)
    engine.check_cache(args, is_cached=data.cache is not None)
    for sentence in recipe.doubts if trains else ():
        print_rank0(f"warning: {sentence}", level="WARNING")
    sources = recipe.lists[split]
    if entry is not None and not (trains and data.sources):
        sources = tuple(s for s in sources if s.path == entry)
    folders = [data.cache.folder] if data.cache else [s.path for s in sources]  # media, or what is read instead
    require_everywhere(folders, "data.params.cache.folder" if data.cache else f"args.{split}")
    index = share_from_first_rank(lambda: build_index(sources, data, probing=_with_progress_bar))
    print_rank0(f"{split}: {index.summary()}")
    if rare := longest_is_rare(clip_lengths(index), data):
        print_rank0(f"{split}: warning: {'; '.join(rare)}.")
    largest = recipe.micro_batch if trains else args.eval_batch_size or recipe.micro_batch
    sizes = data.batch_sizes(recipe.buckets, largest=largest, shape=recipe.shape)
    if entry is not None:
        sizes = dict.fromkeys(sizes, 1)
    reader = None
    if data.cache is not None:
        reader = open_reader(
            data, index, engine.fingerprints(recipe.dtype), draws=trains, conditions=engine.is_conditioned,
            share=share_from_first_rank,
        )  # fmt: skip
    stream = JointStream(
        index, data, batch_sizes=sizes, world=world,
        dtype=engine.batch_dtype(recipe.dtype, model_parallel=mpu.get_model_parallel_world_size()),
        used=samples_used(args, index, data.seed) if trains else None,
        reader=reader,
    )  # fmt: skip
    batches = ", ".join(f"{c.source} {c.bucket}: {c.batch}" for c in stream.schedule.cells)
    print_rank0(f"{split}: samples per rank and step: {batches}")
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


def _is_stream(args: argparse.Namespace, split: str) -> bool:
    """Whether SAT takes whole batches of this list, as the two lines in the YAML tell it to; else single samples.

    Raises `ConfigError` where single samples will not do: SAT would stack several of different shapes, and a full
    checkpoint has no place in such data to come back to.
    """
    iterable = args.iterable_dataset if split == "train_data" else args.iterable_dataset_eval
    if iterable and args.iterable_dataset == "custom":
        return True
    name = "iterable_dataset" if args.iterable_dataset != "custom" else "iterable_dataset_eval"
    value = getattr(args, name)
    place = f"args.{name}: {value!r}" if value else f"args.{name}: missing, which"
    lines = "add the two lines 'iterable_dataset: custom' and 'iterable_dataset_eval: custom' under 'args'"
    if split == "train_data":
        size, key = args.batch_size, "deepspeed.train_micro_batch_size_per_gpu"
    else:
        size, key = args.eval_batch_size or args.batch_size, "args.eval_batch_size"
    if size != 1:
        raise ConfigError(f"{place} makes SAT stack samples of different shapes; {lines}, or set {key} to 1.")
    if split == "train_data" and settings_of(args).checkpoint == "full":
        raise ConfigError(f"{place} leaves the order to SAT, and 'checkpoint: full' cannot go on in it; {lines}.")
    return False


def _with_progress_bar(outcomes: Iterable[Any], total: int) -> Iterable[Any]:
    """A bar on the terminal of the first rank, where there are files enough to wait for."""
    return track(outcomes, description="probing files", total=total, disable=total < MANY_FILES)
