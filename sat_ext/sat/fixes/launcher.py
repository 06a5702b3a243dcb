"""The end of a run that the `deepspeed` command started."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

_DEEPSPEED = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "runner.py"}  # as it may be called


def launcher(args: argparse.Namespace | None = None) -> bool:
    """Symptom: SIGTERM or SIGKILL of the `deepspeed` command leaves the ranks of its machine training on.

    It starts a launcher process, which ends the ranks when it is ended, and does not tell it. The first rank looks
    every second whether the command is there, and else ends the launcher. A launcher that anything else started (a
    shell on another machine) is left alone.
    """
    process = os.getppid()
    command = _parent(process)
    if int(os.environ.get("LOCAL_RANK", 0)) or command is None:
        return False
    if "deepspeed.launcher.launch" not in _arguments(process) or not _DEEPSPEED & set(_arguments(command)):
        return False

    def watch() -> None:
        while _parent(process) == command:
            time.sleep(1)
        if os.getppid() == process:
            os.kill(process, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return True


def _parent(pid: int) -> int | None:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _arguments(pid: int) -> list[str]:
    """The command line of a process, folders left out."""
    with suppress(OSError):
        return [os.path.basename(a) for a in os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")]
    return []
