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
    """Our keys of `args` (docs/checkpoints.md)."""

    checkpoint: Literal["weights", "full"] = "weights"  # as SAT saves them, or all that the run needs to continue
    keep_last: int | None = None  # how many of the newest `full` checkpoints stay; None keeps all
    stop_after_bad_steps: int = 20  # in a row that change no weight: the loss or its gradients are not finite
    deterministic: bool = False  # kernels that give the same bits every time, or an error where there is none
    gradient_norms: bool = False  # log each kind's; the backward pass runs once more for each, at `log_interval`
    evaluate_ema: bool = False  # evaluate the averaged weights of the optimizer `sat_ext.EmaAdamW`
    without_fixes: tuple[str, ...] = ()  # repairs of SAT that are not made
    timeout_minutes: float = 60.0  # how long a rank waits for another, which may be sampling alone

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
