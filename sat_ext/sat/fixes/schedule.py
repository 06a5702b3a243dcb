"""SAT's learning rate over the steps of a run and of its continuation."""

import argparse
from collections.abc import Callable
from typing import Any

from sat_ext.sat.run import run_of

WARM_UP = ("init_step", "auto_warmup_steps", "auto_warmup_rate")  # of AnnealingLR, and not in its own state


def lr_schedule(_args: argparse.Namespace) -> bool:
    """Symptom: a resumed run warms up again for 100 steps, and divides by zero where `warmup` is 0; the last step
    of the linear decay has a learning rate below zero."""
    return True


def continued(make: Callable[..., Any], optimizer: Any, iteration: int, args: Any, **kwargs: Any) -> Any:
    """A resumed run gets the rate that it would have had without the interruption."""
    if iteration == 0:
        return make(optimizer, iteration, args, **kwargs)
    scheduler = make(optimizer, iteration, args, **{**kwargs, "auto_warmup_steps": 0})
    # SAT's 100 first steps of `mode: finetune` at 5 % of the rate are meant: a run stopped within them, which
    # has them in its checkpoint, ends them
    saved = run_of(args).schedule
    for name in WARM_UP:
        setattr(scheduler, name, saved.get(name, getattr(scheduler, name)))
    scheduler.step(scheduler.num_iters)
    return scheduler


def never_negative(get_lr: Callable[[Any], float], scheduler: Any) -> float:
    """No rate below zero, and no division by a warm-up of no steps."""
    if scheduler.warmup_iter == 0 and scheduler.num_iters <= scheduler.init_step + scheduler.auto_warmup_steps:
        return float(scheduler.start_lr * scheduler.auto_warmup_rate)
    return max(0.0, get_lr(scheduler))


def with_warm_up(state_dict: Callable[[Any], dict[str, Any]], scheduler: Any) -> dict[str, Any]:
    """The state of a scheduler with its first steps, for `continued` to find."""
    return {**state_dict(scheduler), **{name: getattr(scheduler, name) for name in WARM_UP}}
