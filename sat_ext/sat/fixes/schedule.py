"""SAT's learning rate over the steps of a run and of its continuation."""

from __future__ import annotations

import argparse
from typing import Any

from sat_ext.sat.run import run_of


def lr_schedule(args: argparse.Namespace) -> bool:
    """Symptom: a resumed run warms up again for 100 steps, and divides by zero where `warmup` is 0; the last step
    of the linear decay has a learning rate below zero.

    A resumed run goes on with the rate that it would have had, and no rate is below zero. The 100 first steps of
    `mode: finetune` at 5 % of the rate are SAT's intention, and stay; a continuation of such a run within them
    finds them in its checkpoint.
    """
    from sat.training import deepspeed_training
    from sat.training.learning_rates import AnnealingLR

    make, get_lr = deepspeed_training.get_learning_rate_scheduler, AnnealingLR.get_lr
    state_dict = AnnealingLR.state_dict

    def get_learning_rate_scheduler(optimizer: Any, iteration: int, args: Any, **kwargs: Any) -> Any:
        if iteration == 0:
            return make(optimizer, iteration, args, **kwargs)
        kwargs["auto_warmup_steps"] = 0
        scheduler = make(optimizer, iteration, args, **kwargs)
        saved = run_of(args).schedule
        for name in WARM_UP:
            setattr(scheduler, name, saved.get(name, getattr(scheduler, name)))
        scheduler.step(scheduler.num_iters)
        return scheduler

    def rate(self: Any) -> float:
        if self.warmup_iter == 0 and self.num_iters <= self.init_step + self.auto_warmup_steps:
            return float(self.start_lr * self.auto_warmup_rate)
        return max(0.0, get_lr(self))

    def state(self: Any) -> dict[str, Any]:
        return {**state_dict(self), **{name: getattr(self, name) for name in WARM_UP}}

    deepspeed_training.get_learning_rate_scheduler = get_learning_rate_scheduler
    AnnealingLR.get_lr, AnnealingLR.state_dict = rate, state
    return True


WARM_UP = ("init_step", "auto_warmup_steps", "auto_warmup_rate")  # of AnnealingLR, and not in its own state
