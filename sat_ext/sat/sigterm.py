"""SIGTERM, as Slurm and launchers send it before they kill: a request to save, which all ranks agree on."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

EXIT_STATUS = 128 + signal.SIGTERM  # 143, as a shell would report a process that SIGTERM ended

_asked = False


def listen() -> None:
    """From now on SIGTERM asks for a stop, the second and third too: launchers repeat what a batch system sends.

    What ends the process at once is SIGKILL, or Ctrl-C.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _ask)


def _ask(_number: int, _frame: FrameType | None) -> None:
    global _asked
    _asked = True


class Spared:
    """A data loader whose workers SIGTERM does not reach, not even while they start: that is left to the training
    process, which needs their batches until it stops."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        blocked = signal.pthread_sigmask(
            signal.SIG_BLOCK, [signal.SIGTERM]
        )  # as it will be in the workers for good
        try:
            return iter(self.loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def __len__(self) -> int:
        return len(self.loader)


def stop_asked(device: torch.device) -> bool:
    """Whether any rank was asked to stop. Every rank must call it; one number is exchanged."""
    flag = torch.tensor([float(_asked)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def stop() -> NoReturn:
    """End this process, in its own time: a SIGTERM that comes now changes its status no more."""
    end_workers()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(EXIT_STATUS)


def end_workers() -> None:
    """End the data workers, busy or not. PyTorch would ask them by the SIGTERM that does not reach them."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch raises an error when a worker dies
    for worker in multiprocessing.active_children():
        worker.kill()
