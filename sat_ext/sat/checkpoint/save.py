"""Writes a full checkpoint aside, and renames it when every rank's files are on the disk."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sat.helpers import print_rank0
from sat.training import model_io

import sat_ext
from sat_ext.checkpoint.layout import DATA_NAME, MANIFEST_NAME, WEIGHTS_NAME, drafts_of, full_checkpoints
from sat_ext.checkpoint.manifest import Manifest, RateState, is_sound, write_manifest, write_synced
from sat_ext.files.atomic import PARTIAL, written_aside
from sat_ext.sat import divergence
from sat_ext.sat.checkpoint import rng
from sat_ext.sat.checkpoint.data_state import cells_of, data_of, first_step, stream_of
from sat_ext.sat.checkpoint.matching import in_checkpoint, is_trained
from sat_ext.sat.checkpoint.optimizer_state import round_robin
from sat_ext.sat.checkpoint.partitions import gather_weights
from sat_ext.sat.checkpoint.writer import Writer
from sat_ext.sat.ema import save_average
from sat_ext.sat.run import RunState, micro_steps, run_of


def save_sound(
    save_weights: Callable[..., None], iteration: int, model: Any, optimizer: Any, lr_scheduler: Any,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Around SAT's `save_checkpoint`: only finite numbers are saved, in full checkpoints by us, else by SAT."""
    run, last = run_of(args), _is_last(iteration, args)
    if not divergence.may_save(run, args, last=last):
        if last:
            sys.exit(1)
        return
    model.empty_partition_cache()  # ZeRO-3 may still fetch ahead of an evaluation, and gathers no such weight
    divergence.check_finite(model, args)
    if run.settings.checkpoint == "full":
        _save_full(iteration, model, lr_scheduler, args)
    else:
        with _out_of_the_way(Path(args.save) / str(iteration)):
            save_weights(iteration, model, optimizer, lr_scheduler, args)
            save_average(model, Path(args.save) / str(iteration))


def _save_full(iteration: int, model: Any, rate: Any, args: argparse.Namespace) -> None:
    """If it cannot be written, the earlier checkpoints stay and training continues; at the end of the run, the
    process exits with status 1."""
    run, folder = run_of(args), Path(args.save)
    if run.saved == iteration and (folder / str(iteration)).is_dir():  # SAT saves the last step's again at the end
        return
    print_rank0(f"saving a full checkpoint of iteration {iteration}")
    writer = Writer(_kept(model.module, run))
    _write(folder, iteration, model, rate, args, writer)
    if writer.error is None:
        run.saved = iteration
        return
    if dist.get_rank() == 0:
        good = [p for p in full_checkpoints(folder) if is_sound(p)]
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no earlier one"
        what = writer.error if writer.placed else f"not saved: {writer.error}; {last}"
        print_rank0(f"error: the checkpoint of iteration {iteration} was {what}.", level="ERROR")
    if _is_last(iteration, args):
        sys.exit(1)


@contextmanager
def _out_of_the_way(folder: Path) -> Iterator[None]:
    """Inside, weights alone are saved as `folder`. A full checkpoint there is replaced whole: its optimizer and
    random numbers would not belong to the new weights."""
    (_, aside), first = drafts_of(folder), dist.get_rank() == 0
    if first and (folder / MANIFEST_NAME).exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    dist.barrier()
    yield
    dist.barrier()
    if first:
        shutil.rmtree(aside, ignore_errors=True)


def _is_last(iteration: int, args: argparse.Namespace) -> bool:
    """Whether no later checkpoint can make up for this one."""
    return iteration >= args.train_iters or run_of(args).stopping


def _write(folder: Path, iteration: int, model: Any, rate: Any, args: argparse.Namespace, writer: Writer) -> None:
    """Write, rename and prune. `writer.error` is the same on every rank afterwards."""
    partial, first, run = folder / f"{iteration}{PARTIAL}", dist.get_rank() == 0, run_of(args)
    if first:
        for leftover in folder.glob(f"*{PARTIAL}"):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        writer.attempt(partial.name, lambda: partial.mkdir(parents=True))
    dist.barrier()  # no rank may write before the folder is there
    _write_engine(model, partial, iteration, writer, run)
    save_average(model, partial, writer.write)
    writer.write(rng.capture(), partial / f"rng_{dist.get_rank()}.pt")
    if first and (epoch := data_of(args)) is not None:
        writer.write(list(epoch.samples), partial / DATA_NAME)
    written = writer.agree()
    if writer.error is None:
        if first:
            files = {name: size for of_rank in written for name, size in sorted(of_rank.items())}
            manifest = _manifest(iteration, model, rate, args, files)
            config = model_io.extract_model_specific_args_to_dump(args, model)
            publish(partial, manifest, config, run.settings.keep_last, writer)
        writer.agree()  # again: the other ranks do not know yet whether publishing failed
    if first and writer.error is not None:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()


def _write_engine(model: Any, partial: Path, iteration: int, writer: Writer, run: RunState) -> None:
    """DeepSpeed's files, and under ZeRO-3 the whole weights too."""
    # what is in its optimizers' files is DeepSpeed's to say; where they go, and which weights, is ours
    own, script = model.checkpoint_engine, model._copy_recovery_script
    model.checkpoint_engine = writer
    model._copy_recovery_script = lambda path: None  # `zero_to_fp32.py` reads no layout but DeepSpeed's
    try:
        model.save_checkpoint(
            str(partial.parent), tag=partial.name, client_state={"iteration": iteration}, save_latest=False,
            exclude_frozen_parameters=not run.whole,
        )  # fmt: skip
        if model.zero_optimization_partition_weights():
            weights = gather_weights(model.module, writer.keep)
            if dist.get_rank() == 0:
                writer.save({"module": weights, "iteration": iteration}, str(partial / WEIGHTS_NAME))
    finally:
        model.checkpoint_engine, model._copy_recovery_script = own, script


def _kept(module: torch.nn.Module, run: RunState) -> Callable[[str], bool]:
    """Which weights a checkpoint of the run holds: all, or those that its base does not give."""
    parameters, belongs = dict(module.named_parameters()), in_checkpoint(module)
    # buffers always: no gradient shows whether training changes them
    return lambda n: belongs(n) and (run.whole or n not in parameters or is_trained(parameters[n]))


def _manifest(iteration: int, model: Any, rate: Any, args: argparse.Namespace, files: dict[str, int]) -> Manifest:
    run, stream = run_of(args), stream_of(args)
    shares = stream.index.shares if stream else {}
    return Manifest(
        sat_ext=sat_ext.__version__,
        iteration=iteration,
        micro_steps=micro_steps(args),
        steps=first_step(args) if stream else 0,
        world=dist.get_world_size(),
        zero_stage=model.zero_optimization_stage(),
        round_robin=round_robin(model),
        seed=stream.schedule.seed if stream else args.seed,
        global_steps=model.global_steps,
        global_samples=model.global_samples,
        skipped_steps=model.skipped_steps,
        whole=run.whole,
        base=run.base,
        rate=RateState(**{field.name: getattr(rate, field.name) for field in fields(RateState)}),
        cells=cells_of(args),
        files=files,
        shares={source: share / sum(shares.values()) for source, share in shares.items()},
    )


def publish(
    partial: Path, manifest: Manifest, model_config: dict[str, Any], keep_last: int | None, writer: Writer
) -> None:
    """On the first rank. An error before the rename leaves things as they were; after it, the checkpoint stays."""
    folder, final = partial.parent, partial.with_name(str(manifest.iteration))
    latest = folder / "latest.new"
    writer.attempt(MANIFEST_NAME, lambda: write_manifest(partial, manifest))
    # names first: after a power failure, `final` must not lack a file
    writer.attempt(partial.name, lambda: _sync(partial))
    writer.attempt("model_config.json", lambda: _replace(folder / "model_config.json", json.dumps(model_config)))
    # written now, while a full disk still does no harm, and renamed last
    writer.attempt("latest", lambda: write_synced(latest, final.name))
    writer.attempt(partial.name, lambda: _rename(partial, final), verb="rename")
    if writer.error is None:
        writer.placed = True
        try:
            _sync(folder)  # `latest` must not name a checkpoint whose rename could be lost
            os.replace(latest, folder / "latest")
            _sync(folder)
        except OSError as error:
            writer.error = (
                f"saved as {final}, but 'latest' could not be written ({error.strerror}): write {final.name} there"
            )
    with suppress(OSError):
        latest.unlink()
    if writer.error is None:  # never while `latest` may name an old one
        prune(folder, manifest.iteration, keep_last)


def prune(folder: Path, newest: int, keep_last: int | None) -> None:
    """Remove all but the `keep_last` newest; those of later iterations, which a run left behind, go first."""
    try:
        if keep_last is not None:
            found = full_checkpoints(folder)
            ranked = sorted(found, key=lambda p: (int(p.name) <= newest, int(p.name)), reverse=True)
            for old in ranked[keep_last:]:
                old.rename(old.with_name(old.name + PARTIAL))  # first: a kill leaves nothing that looks whole
        for leftover in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)
    except OSError as error:  # no reason to end the run: the new checkpoint is good
        print_rank0(
            f"warning: {folder}: an old checkpoint could not be removed ({error.strerror}: {error.filename}); it "
            "is tried again at the next save.",
            level="WARNING",
        )


def _rename(partial: Path, final: Path) -> None:
    _, aside = drafts_of(final)
    # a rename does not replace a folder that is not empty: that of an earlier run, resumed from before it
    if moved := final.exists():
        final.rename(aside)
    try:
        partial.rename(final)
    except OSError:
        if moved:
            aside.rename(final)
        raise


def _replace(path: Path, text: str) -> None:
    with written_aside(path) as draft:
        write_synced(draft, text)


def _sync(folder: Path) -> None:
    """Put a folder's names on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
