"""Repairs of SAT and DeepSpeed. `apply(args)` makes them once per process and logs each in one line.

Every function of `FIXES` returns whether this machine needs it; its docstring begins with the symptom. A name in
`args.without_fixes` leaves a repair out. SAT's `training_main` looks its functions up in its module when it calls
them, so a repair puts another in their place, and nothing of SAT's, DeepSpeed's or CogVideo's files is changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from sat.helpers import print_rank0

from sat_ext.sat.fixes.cpu import cpu_training, no_compiler
from sat_ext.sat.fixes.evaluation import evaluation
from sat_ext.sat.fixes.events import events
from sat_ext.sat.fixes.launcher import launcher
from sat_ext.sat.fixes.loading import load, resume
from sat_ext.sat.fixes.memory import empty_cache, expandable_segments
from sat_ext.sat.fixes.optimizer import ema_optimizer
from sat_ext.sat.fixes.optimizer_path import optimizer_path
from sat_ext.sat.fixes.sampling import zero3_sampling
from sat_ext.sat.fixes.saving import save
from sat_ext.sat.fixes.schedule import lr_schedule
from sat_ext.sat.fixes.sizes import auto_sizes
from sat_ext.sat.fixes.zero3 import parallel_layers, zero3_build
from sat_ext.sat.peers import timeout
from sat_ext.sat.settings import settings_of

FIXES: dict[str, Callable[[argparse.Namespace], bool]] = {
    "cpu_training": cpu_training,
    "no_compiler": no_compiler,
    "resume": resume,
    "load": load,
    "save": save,
    "parallel_layers": parallel_layers,
    "zero3_build": zero3_build,
    "evaluation": evaluation,
    "zero3_sampling": zero3_sampling,  # around that evaluation
    "lr_schedule": lr_schedule,
    "empty_cache": empty_cache,
    "expandable_segments": expandable_segments,
    "ema_optimizer": ema_optimizer,
    "optimizer_path": optimizer_path,
    "auto_sizes": auto_sizes,
    "launcher": launcher,
    "timeout": timeout,
    "events": events,
}

_applied: set[str] = set()


def apply(args: argparse.Namespace) -> None:
    """Apply every repair that this machine needs and `args.without_fixes` does not name. Safe to call again.

    Raises `ConfigError` for an unknown name, and for an optimizer that cannot run here.
    """
    left_out = settings_of(args).without_fixes
    for name, fix in FIXES.items():
        if name not in _applied and name not in left_out and fix(args):
            assert fix.__doc__
            symptom = " ".join(fix.__doc__.split("\n\n")[0].split()).removeprefix("Symptom: ")
            print_rank0(f"repaired '{name}' (args.without_fixes leaves it out). Without it: {symptom}")
        _applied.add(name)
