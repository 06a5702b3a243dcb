"""A run that has diverged ends, and its weights replace no good checkpoint."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sat.helpers import print_rank0
from torch import Tensor

from sat_ext.errors import TrainingError
from sat_ext.ranks import gather
from sat_ext.sat.checkpoint.matching import is_trained
from sat_ext.sat.checkpoint.reshard import own_pieces
from sat_ext.sat.run import RunState


def begin(model: Any) -> None:
    """Prepare DeepSpeed's engine for `count` and `check_finite`, before the first step."""
    if model.zero_optimization_stage() == 3:
        _clear_padding(model)
    scaler: Any = getattr(model.optimizer, "loss_scaler", None)
    if getattr(scaler, "raise_error_at_min_scale", False):
        # where the fp16 loss scale cannot go down, some optimizers raise and others skip: `count` ends both runs
        scaler.raise_error_at_min_scale = False


def attempts(model: Any) -> tuple[int, int]:
    """DeepSpeed's counters: updates, and those of them that it skipped because of their gradients."""
    return int(model.global_steps), int(model.skipped_steps)


def count(run: RunState, model: Any, args: argparse.Namespace, before: tuple[int, int]) -> None:
    """Count a step that changed no weight; `before` is `attempts` from before the step. All ranks count alike.
    Raises `TrainingError` after `stop_after_bad_steps`."""
    # SAT abandons a step if the loss of any rank is not finite, DeepSpeed one whose gradients are not; what SAT
    # returns does not say so
    begun, skipped = attempts(model)
    if begun > before[0] and skipped == before[1]:
        run.bad_steps = 0
        return
    if skipped > before[1] and _is_searching(model):
        return
    run.bad_steps += 1
    if run.bad_steps >= run.settings.stop_after_bad_steps:
        raise TrainingError(
            f"training has diverged: in {run.bad_steps} steps in a row, up to iteration {args.iteration + 1}, the "
            f"loss or its gradients were not finite; {_remedy(args)}, or raise args.stop_after_bad_steps."
        )


def may_save(run: RunState, args: argparse.Namespace, *, last: bool) -> bool:
    """Whether the newest step changed the weights. If not, the save is put off until after a step that does; after
    the `last` one there is none."""
    run.save_owed = run.bad_steps > 0
    if run.save_owed:
        then = "the run has ended" if last else "the run saves after the next good step"
        print_rank0(
            f"error: the checkpoint of iteration {args.iteration} was not saved: the loss or its gradients were "
            f"not finite in the last {run.bad_steps} step(s); {then}.",
            level="ERROR",
        )
    return not run.save_owed


def check_finite(model: Any, args: argparse.Namespace) -> None:
    """Raise `TrainingError` on every rank if a trained weight or optimizer state of any rank is not finite.

    Numbers are read where they are, in ZeRO's shards or on the CPU; what is swapped to a disk is not read."""
    bad = next((name for name, value in _numbers(model) if not _is_finite(value)), None)
    for rank, name in enumerate(gather(bad)):
        if name is not None:
            raise TrainingError(
                f"training has diverged: at iteration {args.iteration}, {name} of rank {rank} is not finite, so "
                f"no checkpoint was saved; {_remedy(args)}."
            )


def _is_searching(model: Any) -> bool:
    """Whether fp16's dynamic loss scale may still go down: skipped steps are how it finds its value."""
    is_dynamic = model.fp16_enabled() and model.dynamic_loss_scale()
    return bool(is_dynamic and model.optimizer.loss_scale > model._config.float16_config.min_loss_scale)


@torch.no_grad()
def _clear_padding(model: Any) -> None:
    """ZeRO-3 splits a weight into parts of equal size. DeepSpeed leaves the end of the last one uninitialized, and
    `check_finite` would take what is there for weights."""
    for parameter in model.module.parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is not None and is_trained(parameter):
            first = part.ds_numel * dist.get_rank(parameter.ds_process_group)
            part[max(0, parameter.ds_numel - first) :] = 0
    flat = model.optimizer.fp32_partitioned_groups_flat
    pieces, ends = own_pieces(model)
    for piece in reversed(pieces):
        flat[piece.group].data[piece.start + piece.numel : ends[piece.group]] = 0
        ends[piece.group] = piece.start


def _numbers(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.module.named_parameters():
        if is_trained(parameter):
            yield name, getattr(parameter, "ds_tensor", parameter)
    optimizer = getattr(model, "basic_optimizer", None)
    for number, (master, state) in enumerate(optimizer.state.items() if optimizer is not None else ()):
        yield f"fp32 weight {number}", master
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"the optimizer's {key} of weight {number}", value


def _is_finite(value: Tensor) -> bool:
    value = value.detach()
    if not value.is_floating_point() or value.numel() == 0:
        return True
    # one pass without a mask of the tensor's size; NaN comes through
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _remedy(args: argparse.Namespace) -> str:
    advice = "a lower learning rate (deepspeed.optimizer.params.lr) or a lower deepspeed.gradient_clipping"
    for folder in (args.save, args.load):
        if folder and (Path(folder) / "latest").is_file():
            newest = (Path(folder) / "latest").read_text().strip()
            return f"resume from the last good checkpoint, {newest} of {folder} (args.load), with {advice}"
    return f"start again with {advice}"
