"""Writes a full checkpoint aside, and renames it when every rank's files are on the disk."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from sat.helpers import print_rank0
from sat.training import model_io
from torch import Tensor

import sat_ext
from sat_ext.checkpoint.layout import (
    MANIFEST_NAME,
    OPTIMIZER_NAME,
    PARTIAL,
    WEIGHTS_NAME,
    aside_of,
    full_checkpoints,
)
from sat_ext.checkpoint.manifest import Manifest, RateState, is_sound
from sat_ext.ranks import gather
from sat_ext.sat.checkpoint import rng
from sat_ext.sat.checkpoint.data_state import cells_of, data_of, stream_of
from sat_ext.sat.checkpoint.epoch import DATA_NAME
from sat_ext.sat.checkpoint.load import round_robin
from sat_ext.sat.checkpoint.matching import in_checkpoint, is_trained
from sat_ext.sat.checkpoint.partitions import gather_weights
from sat_ext.sat.checkpoint.publish import find_missing, publish
from sat_ext.sat.run import RunState, micro_steps, run_of


class Writer(CheckpointEngine):
    """What DeepSpeed writes through. A file that cannot be written is remembered in `error`, not raised: the other
    ranks are already waiting in a barrier. `keep` tells which weights, by name, belong in the checkpoint;
    `written` has the sizes of the files, by name; `placed`: the checkpoint has its name, whatever went wrong then.
    """

    def __init__(self, keep: Callable[[str], bool]) -> None:
        super().__init__()
        self.keep = keep
        self.error: str | None = None
        self.placed = False
        self.written: dict[str, int] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to announce."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """What makes a checkpoint good is its rename."""
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reading goes another way (`load.py`)."""
        raise AssertionError(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        self.attempt(path, lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write and sync one file; the weights without what `keep` leaves out, and without the optimizer."""
        if os.path.basename(path) == WEIGHTS_NAME:
            weights = {name: value for name, value in state_dict["module"].items() if self.keep(name)}
            optimizer = state_dict.get("optimizer")
            if optimizer is not None:  # without ZeRO it would be in the file that SAT loads
                self._write(optimizer, os.path.join(os.path.dirname(path), OPTIMIZER_NAME))
            state_dict = {**state_dict, "module": weights, "optimizer": None}
        self._write(state_dict, path)

    def attempt(self, path: str, write: Callable[[], None], verb: str = "write") -> None:
        """Call `write`, unless something went wrong before; remember what goes wrong."""
        if self.error is not None:
            return
        try:
            write()
        except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's, upon the disk's
            told: BaseException | None = error
            while told is not None and not isinstance(told, OSError):
                told = told.__context__
            reason = told.strerror if isinstance(told, OSError) else str(error).splitlines()[0].rstrip(". ")
            self.error = f"rank {dist.get_rank()} could not {verb} {os.path.basename(path)} ({reason})"
            if isinstance(told, OSError) and told.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self.error += "; make room for it"

    def _write(self, value: Any, path: str) -> None:
        def write() -> None:
            with open(path, "wb") as file:
                torch.save(value, file)
                file.flush()
                os.fsync(file.fileno())
                self.written[os.path.basename(path)] = os.fstat(file.fileno()).st_size

        self.attempt(path, write)


def save_checkpoint(
    iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, args: argparse.Namespace
) -> None:
    """In place of SAT's: the full state of the run, as `<args.save>/<iteration>/`. Called on every rank.

    A checkpoint that cannot be written leaves the earlier ones as they are, and training goes on; at the end of
    the run, it ends with exit status 1.
    """
    run, folder = run_of(args), Path(args.save)
    if run.saved == iteration and (folder / str(iteration)).is_dir():  # the last step's, saved again at the end
        return
    print_rank0(f"saving a full checkpoint of iteration {iteration}")
    writer = Writer(_kept(model.module, run))
    error = _write(folder, iteration, model, lr_scheduler, args, run, writer)
    if error is None:
        run.saved = iteration
        return
    if dist.get_rank() == 0:
        good = [p for p in full_checkpoints(folder) if is_sound(p)]
        stands = f"the last good one stands: {good[-1]}" if good else "there is no earlier one"
        what = error if writer.placed else f"not saved: {error}; {stands}"
        print_rank0(f"error: the checkpoint of iteration {iteration} was {what}.", level="ERROR")
    if is_last(iteration, args):
        sys.exit(1)


@contextmanager
def out_of_the_way(folder: Path) -> Iterator[None]:
    """For weights alone, saved where a full checkpoint may lie, whose files would not fit together any more."""
    aside, first = aside_of(folder), dist.get_rank() == 0
    if first and (folder / MANIFEST_NAME).exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    dist.barrier()
    yield
    dist.barrier()
    if first:
        shutil.rmtree(aside, ignore_errors=True)


def is_last(iteration: int, args: argparse.Namespace) -> bool:
    """Whether no later checkpoint can make up for this one."""
    return iteration >= args.train_iters or run_of(args).stopping


def _write(
    folder: Path, iteration: int, model: Any, rate: Any, args: argparse.Namespace, run: RunState, writer: Writer
) -> str | None:
    """Write, rename and prune; what went wrong, on every rank, or None."""
    partial, first = folder / f"{iteration}{PARTIAL}", dist.get_rank() == 0
    if first:
        for leftover in folder.glob(f"*{PARTIAL}"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        writer.makedirs(str(partial))
    dist.barrier()
    _write_engine(model, folder, partial.name, iteration, writer, run)
    writer._write(rng.capture(), str(partial / f"rng_{dist.get_rank()}.pt"))
    if first and (epoch := data_of(args)) is not None:
        writer._write(list(epoch.samples), str(partial / DATA_NAME))
    error, written = _gather(writer)
    if error is None:
        if first and (missing := find_missing(partial, written)) is not None:
            writer.error = missing
        elif first:
            files = {name: size for of_rank in written for name, size in sorted(of_rank.items())}
            manifest = _manifest(iteration, model, rate, args, run, files)
            config = model_io.extract_model_specific_args_to_dump(args, model)
            publish(partial, manifest, config, run.settings.keep_last, writer)
        error, _ = _gather(writer)
    if error is not None:  # on every rank: each may have written to a disk of its own
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    return error


def _write_engine(model: Any, folder: Path, tag: str, iteration: int, writer: Writer, run: RunState) -> None:
    """DeepSpeed's files, and under ZeRO-3 the whole weights too."""
    own, script = model.checkpoint_engine, model._copy_recovery_script
    model.checkpoint_engine = writer
    model._copy_recovery_script = lambda path: None  # `zero_to_fp32.py` reads no layout but DeepSpeed's
    try:
        model.save_checkpoint(
            str(folder), tag=tag, client_state={"iteration": iteration}, save_latest=False,
            exclude_frozen_parameters=not run.whole,
        )  # fmt: skip
        if model.zero_optimization_partition_weights():
            weights = gather_weights(model.module, writer.keep)
            if dist.get_rank() == 0:
                writer.save({"module": weights, "iteration": iteration}, str(folder / tag / WEIGHTS_NAME))
    finally:
        model.checkpoint_engine, model._copy_recovery_script = own, script


def _kept(module: torch.nn.Module, run: RunState) -> Callable[[str], bool]:
    """Which weights a checkpoint of the run holds: all, or those that its base does not give."""
    parameters, belongs = dict(module.named_parameters()), in_checkpoint(module)

    def keep(name: str) -> bool:
        parameter: Tensor | None = parameters.get(name)
        return belongs(name) and (run.whole or parameter is None or is_trained(parameter))

    return keep


def _gather(writer: Writer) -> tuple[str | None, list[dict[str, int]]]:
    """On every rank: the error of the first rank that has one, and each rank's files with their sizes."""
    all_ranks = gather((writer.error, writer.written))
    return next((error for error, _ in all_ranks if error is not None), None), [w for _, w in all_ranks]


def _manifest(
    iteration: int, model: Any, rate: Any, args: argparse.Namespace, run: RunState, files: dict[str, int]
) -> Manifest:
    stream = stream_of(args)
    shares = stream.index.shares if stream else {}
    return Manifest(
        sat_ext=sat_ext.__version__,
        iteration=iteration,
        micro_steps=micro_steps(args),
        world=dist.get_world_size(),
        zero_stage=model.zero_optimization_stage(),
        round_robin=round_robin(model),
        seed=stream.schedule.seed if stream else args.seed,
        global_steps=model.global_steps,
        global_samples=model.global_samples,
        skipped_steps=model.skipped_steps,
        whole=run.whole,
        base=run.base,
        rate=RateState(
            num_iters=rate.num_iters,
            init_step=rate.init_step,
            auto_warmup_steps=rate.auto_warmup_steps,
            auto_warmup_rate=rate.auto_warmup_rate,
        ),
        cells=cells_of(args),
        files=files,
        shares={source: share / sum(shares.values()) for source, share in shares.items()},
    )
