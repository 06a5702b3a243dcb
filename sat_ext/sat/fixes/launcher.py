"""The end of a run whose launcher was ended."""

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_DEEPSPEED = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "runner.py"}  # as it may be called
LAST_SAVE = 600.0  # seconds; torchrun itself gives its ranks 30, in which a large checkpoint is not written


def launcher(args: argparse.Namespace | None = None) -> bool:
    """Symptom: SIGKILL of `torchrun`, and SIGTERM or SIGKILL of the `deepspeed` command, leave the ranks of its
    machine training on.

    torchrun starts the ranks itself: each checks every second that it is still there, and otherwise sends itself
    SIGTERM, on which it saves and ends. DeepSpeed's command starts a launcher process, which ends the ranks when
    it is ended, but gets no signal from the command: the first rank checks that the command is there, and
    otherwise ends the launcher. What anything else started (a shell on another machine) is left alone.
    """
    process = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # which torchrun sets
        _start(_follow, process)
        return True
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

    _start(watch)
    return True


def _follow(parent: int) -> None:
    """End this process some time after its parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SAVE)
    os.kill(os.getpid(), signal.SIGKILL)  # it hangs, or waits for a rank that does


def _start(watch: Callable[..., None], *arguments: int) -> None:
    threading.Thread(target=watch, args=arguments, daemon=True).start()


def _parent(pid: int) -> int | None:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _arguments(pid: int) -> list[str]:
    """The command line of a process, folders left out."""
    with suppress(OSError):
        return [os.path.basename(a) for a in os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")]
    return []
