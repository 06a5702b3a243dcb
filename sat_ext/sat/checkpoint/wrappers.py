"""What is put around SAT's functions for checkpoints (`hooks.py`), so that a run can be resumed."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sat_ext.checkpoint.layout import find_weights
from sat_ext.checkpoint.manifest import read_manifest
from sat_ext.sat import divergence
from sat_ext.sat.checkpoint import load, matching, save
from sat_ext.sat.run import run_of


def save_sound(save_weights: Callable[..., None]) -> Callable[..., None]:
    """Save only finite numbers, in checkpoints of either kind: `full` by us, and weights alone by SAT."""

    def save_checkpoint(
        iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, args: argparse.Namespace
    ) -> None:
        run, last = run_of(args), save.is_last(iteration, args)
        if not divergence.may_save(run, args, last=last):
            if last:
                sys.exit(1)
            return
        model.empty_partition_cache()  # ZeRO-3 may still fetch ahead of an evaluation, and gathers no such weight
        divergence.check_finite(model, args)
        if run.settings.checkpoint == "full":
            save.save_checkpoint(iteration, model, lr_scheduler, args)
        else:
            with save.out_of_the_way(Path(args.save) / str(iteration)):
                save_weights(iteration, model, optimizer, lr_scheduler, args)

    return save_checkpoint


def load_full(load_weights: Callable[..., int]) -> Callable[..., int]:
    """Load full checkpoints ourselves, and leave any other to SAT."""

    def load_checkpoint(model: Any, args: argparse.Namespace, *rest: Any, **options: Any) -> int:
        if rest or options or read_manifest(find_weights(Path(args.load)).parent) is None:
            return load_weights(model, args, *rest, **options)
        return load.load_weights(model, args)

    return load_checkpoint


def set_up_resumable(set_up: Callable[..., Any]) -> Callable[..., Any]:
    """Check what trains against the checkpoint before an optimizer is made. Keep the engine for later."""

    def set_up_optimizer(args: argparse.Namespace, model: Any, *rest: Any, **options: Any) -> Any:
        run = run_of(args)
        if run.base is not None or run.resumed is not None:
            if hasattr(model, "disable_untrainable_params"):
                model.disable_untrainable_params()  # SAT would next: it says which weights train
            matching.check_trained(model, run)
        run.engine, optimizer = set_up(args, model, *rest, **options)
        return run.engine, optimizer

    return set_up_optimizer


def with_saved_state(make_scheduler: Callable[..., Any]) -> Callable[..., Any]:
    """Restore the optimizer and the learning rate."""

    def get_learning_rate_scheduler(
        optimizer: Any, iteration: int, args: argparse.Namespace, **options: Any
    ) -> Any:
        scheduler, run = make_scheduler(optimizer, iteration, args, **options), run_of(args)
        if run.resumed is not None:  # only now: SAT takes the rates that it finds in the optimizer for scales
            load.load_optimizer(run, scheduler)
        return scheduler

    return get_learning_rate_scheduler
