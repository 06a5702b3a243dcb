"""SIGTERM, as Slurm and launchers send it before they kill: a request to save, which all ranks agree on."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from types import FrameType

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


def stop_asked(device: torch.device) -> bool:
    """Whether any rank was asked to stop. Every rank must call it; one number is exchanged."""
    flag = torch.tensor([float(_asked)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def outlive() -> None:
    """In a data worker: leave SIGTERM to the training process, which needs the batches until it stops."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """End the data workers, busy or not. PyTorch would ask them by the SIGTERM that they ignore, and wait."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch raises an error when a worker dies
    for worker in multiprocessing.active_children():
        worker.kill()
