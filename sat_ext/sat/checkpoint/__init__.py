"""Checkpoints of the full state of a run: weights, optimizer, learning rate, random numbers, place in the data.

With `args.checkpoint: full`. What is saved can be gone on with by `mode: pretrain` and `load: <the run's folder>`,
under the same number of ranks bit for bit, under another with each sample of the epoch once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_installed = False


def install(args: argparse.Namespace) -> None:
    """Have SAT's `training_main` save, load and count as this package does. Call it after `fixes.apply`.

    Raises `ConfigError` where `args.load` is not a checkpoint that can be gone on with.
    """
    global _installed
    from sat_ext.sat import steps
    from sat_ext.sat.run import run_of

    run_of(args)
    if not _installed:
        _installed = True
        steps.install()
        _replace_functions()


def _replace_functions() -> None:
    from sat.training import deepspeed_training as sat

    from sat_ext.checkpoint.layout import find_weights
    from sat_ext.checkpoint.manifest import read_manifest
    from sat_ext.sat import divergence
    from sat_ext.sat.checkpoint import load, matching, save
    from sat_ext.sat.run import run_of

    save_weights, load_weights = sat.save_checkpoint, sat.load_checkpoint
    set_up, make_scheduler = sat.setup_model_untrainable_params_and_optimizer, sat.get_learning_rate_scheduler

    def save_checkpoint(
        iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, args: argparse.Namespace
    ) -> None:
        run, last = run_of(args), save.is_last(iteration, args)
        if not divergence.stands(run, args, last=last):
            if last:
                sys.exit(1)
            return
        model.empty_partition_cache()  # ZeRO-3 may still fetch ahead of an evaluation, and gathers no such weight
        divergence.check_finite(model, args)
        if run.settings.checkpoint == "full":
            save.save_checkpoint(iteration, model, optimizer, lr_scheduler, args)
        else:
            with save.out_of_the_way(Path(args.save) / str(iteration)):
                save_weights(iteration, model, optimizer, lr_scheduler, args)

    def load_checkpoint(model: Any, args: argparse.Namespace, *rest: Any, **options: Any) -> int:
        if rest or options or read_manifest(find_weights(Path(args.load)).parent) is None:
            return load_weights(model, args, *rest, **options)
        return load.load_weights(model, args)

    def set_up_optimizer(args: argparse.Namespace, model: Any, *rest: Any, **options: Any) -> Any:
        run = run_of(args)
        if run.base is not None or run.resumed is not None:
            if hasattr(model, "disable_untrainable_params"):
                model.disable_untrainable_params()  # SAT would next: it tells which weights train
            matching.check_trained(model, run)
        run.engine, optimizer = set_up(args, model, *rest, **options)
        return run.engine, optimizer

    def get_learning_rate_scheduler(
        optimizer: Any, iteration: int, args: argparse.Namespace, **options: Any
    ) -> Any:
        scheduler, run = make_scheduler(optimizer, iteration, args, **options), run_of(args)
        if run.resumed is not None:  # only now: SAT takes the rates that it finds in the optimizer for scales
            load.load_optimizer(run, scheduler)
        return scheduler

    sat.save_checkpoint, sat.load_checkpoint = save_checkpoint, load_checkpoint
    sat.setup_model_untrainable_params_and_optimizer = set_up_optimizer
    sat.get_learning_rate_scheduler = get_learning_rate_scheduler
