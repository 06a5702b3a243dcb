"""SIGTERM, which Slurm and launchers send before they kill: a request to save, on which all ranks agree."""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

EXIT_STATUS = 128 + signal.SIGTERM  # 143, as a shell would report a process that SIGTERM ended

_asked = False


def listen() -> None:
    """From now on SIGTERM asks for a stop, however often it comes: launchers repeat what a batch system sends.

    SIGKILL and Ctrl-C still end the process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _ask)


def _ask(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True


@contextmanager
def spared() -> Iterator[None]:
    """Processes that start inside ignore SIGTERM from the first: a batch system sends it to the data workers too,
    and the training process needs their batches until it stops."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # they inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def stop_asked(device: torch.device) -> bool:
    """Whether any rank was asked to stop. Every rank must call it; one number is exchanged."""
    flag = torch.tensor([float(_asked)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def stop() -> NoReturn:
    """End this process with status 143."""
    end_workers()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another one now must not end it with a different status
    sys.exit(EXIT_STATUS)


def end_workers() -> None:
    """Kill the data workers, busy or not. PyTorch would send them the SIGTERM that they ignore, and wait."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch raises an error when a worker dies
    for worker in multiprocessing.active_children():
        worker.kill()
