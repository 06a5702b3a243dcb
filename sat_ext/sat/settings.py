"""The settings that `sat_ext` adds to SAT's own, in the section `args` of the YAML."""

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sat_ext.config import load, read_yaml
from sat_ext.errors import ConfigError

MINUTES = 0.2, 10080  # more than the seconds between two messages of a rank that works alone; a week


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`checkpoint`: what a checkpoint holds, `weights` as SAT saves them or the `full` state of the run.

    `keep_last`: how many of the newest `full` checkpoints stay; None keeps all.
    `stop_after_bad_steps`: how many steps in a row may change no weight, because the loss or its gradients are not
    finite, before the run ends. `without_fixes`: repairs of SAT that are not made.
    `deterministic`: use only kernels that give the same bits every time; PyTorch raises an error if there is none.
    `gradient_norms`: log how large each kind's part of the gradient is, at every `log_interval`; the backward pass
    of that step runs once more for each kind.
    `timeout_minutes`: how long a rank waits for another, which may be sampling alone in an evaluation.
    """

    checkpoint: Literal["weights", "full"] = "weights"
    keep_last: int | None = None
    stop_after_bad_steps: int = 20
    deterministic: bool = False
    gradient_norms: bool = False
    without_fixes: tuple[str, ...] = ()
    timeout_minutes: float = 60.0

    def __post_init__(self) -> None:
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigError(f"args.keep_last: {self.keep_last}; use 1 or more, or leave it out to keep all.")
        if self.stop_after_bad_steps < 1:
            raise ConfigError(f"args.stop_after_bad_steps: {self.stop_after_bad_steps}; use 1 or more.")
        if not MINUTES[0] <= self.timeout_minutes <= MINUTES[1]:
            raise ConfigError(
                f"args.timeout_minutes: {self.timeout_minutes}; use {MINUTES[0]} to {MINUTES[1]} (a week)."
            )


NAMES = tuple(f.name for f in fields(Settings))


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a run: from `args` where our parser put them, or from the YAML files in `args.base`, because
    CogVideo's script drops the keys that it does not know. Raises `ConfigError`."""
    own: Mapping[str, Any] = {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
    if len(own) < len(NAMES):
        paths = getattr(args, "base", None)
        own = (read_yaml(paths).get("args") or {}) if paths else {}
        for key in own:  # a misspelt one would be ignored too
            near = difflib.get_close_matches(key, NAMES, n=1, cutoff=0.8)
            if near and key not in NAMES and not hasattr(args, key):
                raise ConfigError(f"args: unknown key '{key}'; did you mean '{near[0]}'?")
    return load(Settings, {k: v for k, v in own.items() if k in NAMES and v is not None}, "args")
