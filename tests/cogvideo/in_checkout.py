"""Checks against CogVideo's own code, each generation in a process of its own (`on_cpu.prepare` changes torch).

A test file has functions `check_...(sat)` that import from the checkout, and ends with

    test_original = in_checkout.test_of(__file__)
    if __name__ == "__main__":
        in_checkout.main(globals())

COGVIDEO_SAT names the `sat` folder of a checkout, or several, separated by ":". A check without a meaning for one
generation raises `Skip` there.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest


class Skip(Exception):
    """Why a check says nothing about this generation."""


def test_of(script: str) -> Callable[[str, Path], None]:
    """A test for every check in `script` and every checkout."""
    checks = re.findall(r"^def check_(\w+)\(", Path(script).read_text(), re.MULTILINE)
    folders = [Path(p) for p in os.environ.get("COGVIDEO_SAT", "").split(":") if p]
    skipped = pytest.param(None, id="no_checkout", marks=pytest.mark.skip(reason="COGVIDEO_SAT is not set"))

    @pytest.mark.parametrize("check", checks)
    @pytest.mark.parametrize("sat", folders or [skipped], ids=lambda p: p.parent.name if p else "")
    def test_original(check: str, sat: Path) -> None:
        outcome = outcomes(script, sat)[check]
        if outcome is not None and outcome.startswith("skip: "):
            pytest.skip(outcome)
        assert outcome is None, outcome

    return test_original


test_of.__test__ = False  # type: ignore[attr-defined]


@lru_cache(maxsize=4)
def outcomes(script: str, sat: Path) -> dict[str, str | None]:
    """What the checks of `script` say of the checkout: None, why not, or the traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = subprocess.run(
        [sys.executable, script, str(sat)], env=os.environ | env, capture_output=True, text=True, timeout=1500
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    answer: dict[str, str | None] = json.loads(run.stdout.splitlines()[-1])
    return answer


def main(names: dict[str, Any]) -> None:
    """Run the checks among `names` on the checkout that the command line names, and print the outcomes."""
    import on_cpu

    sat = on_cpu.prepare(sys.argv[1])
    found: dict[str, str | None] = {}
    for name in [n for n in names if n.startswith("check_")]:
        try:
            names[name](sat)
            found[name.removeprefix("check_")] = None
        except Skip as reason:
            found[name.removeprefix("check_")] = f"skip: {reason}"
        except Exception:
            found[name.removeprefix("check_")] = traceback.format_exc()
    print(flush=True)
    print(json.dumps(found))
