"""Around SAT's steps: resume the run, count its batches, stop on SIGTERM, log the losses of each kind."""

import argparse
import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from sat.helpers import print_rank0
from sat.training import deepspeed_training
from torch import Tensor

from sat_ext.models.config import ABSENT
from sat_ext.sat import divergence, sigterm
from sat_ext.sat.checkpoint import rng
from sat_ext.sat.checkpoint.claim import claim
from sat_ext.sat.checkpoint.load import restore_rng
from sat_ext.sat.memory_report import measuring, report_of
from sat_ext.sat.run import RunState, micro_steps, run_of
from sat_ext.sat.run_log import RunLog


def with_spared_workers(
    train: Callable[..., Any], model: Any, optimizer: Any, lr_scheduler: Any, train_data: Any, val_data: Any,
    timers: Any, args: argparse.Namespace, **options: Any,
) -> Any:  # fmt: skip
    """SAT's `train`, whose data workers SIGTERM does not reach, and whose held-out batches draw nothing."""
    if _saves(run_of(args), args):
        train_data, val_data = (None if d is None else Begun(d, sigterm.spared) for d in (train_data, val_data))
    # PyTorch draws a seed for its workers: a run with held-out data would train on other numbers than one without
    val_data = None if val_data is None else Begun(val_data, rng.untouched)
    return train(model, optimizer, lr_scheduler, train_data, val_data, timers, args, **options)


class Begun:
    """A data loader whose iterator, and with it its workers, begins inside of `around`."""

    def __init__(self, loader: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
        self.loader, self.around = loader, around

    def __iter__(self) -> Iterator[Any]:
        with self.around():
            return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


def counted_step(
    train_step: Callable[..., Any], data: Iterator[Any], model: Any, optimizer: Any, lr_scheduler: Any,
    args: argparse.Namespace, timers: Any, hooks: dict[str, Any], **options: Any,
) -> Any:  # fmt: skip
    """SAT's `train_step`: before it a run is resumed, stopped or saved, and in it batches are counted."""
    run = run_of(args)
    if not run.began:
        _begin(run, args)
        divergence.begin(model)
    # a stop waits for a step that can be saved: one bad batch must not cost all since the last checkpoint
    stops = _saves(run, args) and sigterm.stop_asked(model.device) and run.bad_steps == 0
    if stops:
        run.stopping = True
        print_rank0(f"SIGTERM: saving iteration {args.iteration}, then ending")
    if (stops and args.iteration > 0) or (run.save_owed and run.bad_steps == 0):
        deepspeed_training.save_checkpoint(args.iteration, model, optimizer, lr_scheduler, args)
    if stops:
        sigterm.stop()
    before = divergence.attempts(model)
    hooks = {**hooks, "forward_step": measuring(_counted(hooks["forward_step"]))}
    loss, skipped, metrics = train_step(data, model, optimizer, lr_scheduler, args, timers, hooks=hooks, **options)
    report_of(args).close()
    divergence.count(run, model, args, before)
    run.log.after_step(timers, getattr(model, "module", model))
    return loss, skipped, metrics | ({} if skipped else _of_update(model))


def _of_update(model: Any) -> dict[str, Tensor]:
    """The norm of the update's gradient before clipping, and whether it was clipped. SAT logs the means over its
    `log_interval`: of the latter, how often."""
    norm = model.get_global_grad_norm()
    if norm is None:
        return {}
    values = {"grad_norm": float(norm)}
    if clip := model.gradient_clipping():
        values["clipped"] = float(norm > clip)
    return {name: torch.tensor(value) for name, value in values.items()}


def untouched(evaluate: Callable[..., Any], *arguments: Any, hooks: dict[str, Any], **options: Any) -> Any:
    """An evaluation that leaves the random numbers as they were: how many a run has does not change it."""
    hooks = {**hooks, "forward_step_eval": _with_losses_by_kind(hooks["forward_step_eval"])}
    hooks["handle_metrics"] = hooks.get("handle_metrics") or mean_metrics
    with rng.untouched():
        return evaluate(*arguments, hooks=hooks, **options)


def mean_metrics(gathered: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the steps and ranks that had a value, as SAT expects them of a script's `handle_metrics`."""
    means = {name: values[values != ABSENT].float() for name, values in gathered.items()}
    return {name: values.mean().reshape(1) for name, values in means.items() if values.numel()}


def _saves(run: RunState, args: argparse.Namespace) -> bool:
    return run.settings.checkpoint == "full" and bool(args.save)


def _begin(run: RunState, args: argparse.Namespace) -> None:
    """Just before the first step: SAT seeds, and the data loaders draw, until then, so random numbers that were
    restored earlier would be overwritten."""
    run.began = True
    run.micro_steps = micro_steps(args)
    if _saves(run, args):
        atexit.register(sigterm.end_workers)  # after multiprocessing's own function, and so called before it
        claim(Path(args.save))
        sigterm.listen()
        print_rank0(f"on SIGTERM the run saves a checkpoint and ends: kill -TERM {os.getpid()}")
    if run.resumed is not None:
        restore_rng(run, args)
    run.log = RunLog(run, args)  # once the folder is known to be this run's


def _counted(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """Counts a batch as soon as it is taken, finite loss or not: a resumed run must not repeat it."""
    forward = _with_losses_by_kind(forward_step)

    def step(data: Iterator[Any], model: Any, args: argparse.Namespace, *rest: Any, **options: Any) -> Any:
        result = forward(run_of(args).log.seeing(data), model, args, *rest, **options)
        run_of(args).micro_steps = micro_steps(args) + 1
        return result

    return step


def _with_losses_by_kind(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the `metrics()` of a CogVideo engine's loss to the metrics that the script's step returns."""

    def step(data: Iterator[Any], model: Any, *rest: Any, **options: Any) -> Any:
        result = forward_step(data, model, *rest, **options)
        loss_fn = getattr(getattr(model, "module", model), "loss_fn", None)
        if loss_fn is None or not hasattr(loss_fn, "metrics"):
            return result
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        own: dict[str, Tensor] = loss_fn.metrics()
        return loss, {**metrics, **{k: v.detach().float() for k, v in own.items() if k not in metrics}}

    return step
