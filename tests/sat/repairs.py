"""One repair of SAT at a time."""

from __future__ import annotations

from argparse import Namespace

from sat_ext.sat.hooks import FIXES, HOOKS, put


def repair(name: str, args: Namespace) -> bool:
    """Make the repair if it is needed; whether it is."""
    needed = FIXES[name](args)
    if needed:
        put(hook for hook in HOOKS if hook.fix == name)
    return needed
