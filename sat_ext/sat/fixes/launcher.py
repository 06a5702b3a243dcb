"""The end of a run whose launcher was killed."""

import argparse
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

DEEPSPEED = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "runner.py"}  # names of its command
LAST_SAVE = 600.0  # seconds; torchrun itself gives its ranks 30, in which a large checkpoint is not written


def launcher(_args: argparse.Namespace) -> bool:
    """Symptom: SIGKILL of `torchrun`, and SIGTERM or SIGKILL of the `deepspeed` command, leave the ranks of its
    machine training on.

    Each rank checks every second that the launcher is still there, and otherwise sends itself SIGTERM, on which it
    saves and ends. Ranks that anything else started (a shell on another machine) are left alone."""
    parent, command = _ancestors(2)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun, which starts the ranks itself
        generations = 1
    elif "deepspeed.launcher.launch" in _arguments(parent) and DEEPSPEED & set(_arguments(command)):
        generations = 2  # the command starts a launcher process, which gets no signal when the command is killed
    else:
        return False
    threading.Thread(target=_follow, args=[(parent, command)[:generations]], daemon=True).start()
    return True


def _follow(ancestors: tuple[int, ...]) -> None:
    while _ancestors(len(ancestors)) == ancestors:  # a process whose parent dies gets another one
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SAVE)
    os.kill(os.getpid(), signal.SIGKILL)  # it hangs, or waits for a rank that does


def _ancestors(generations: int) -> tuple[int, ...]:
    """The process ids of parent, grandparent, ...; 0 for those that are gone."""
    pids = [os.getpid()]
    for _ in range(generations):
        pids.append(0)
        with suppress(OSError):
            pids[-1] = int(Path(f"/proc/{pids[-2]}/stat").read_text().rpartition(")")[2].split()[1])
    return tuple(pids[1:])


def _arguments(pid: int) -> list[str]:
    """The command line of a process, without folders."""
    with suppress(OSError):
        return [os.path.basename(a) for a in os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")]
    return []
