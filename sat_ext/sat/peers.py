"""The other ranks: how long one waits for them, and which of them is gone when an exchange fails.

Each rank increments its own counter in the process group's store, from a thread that runs while the training
waits. The counter of a rank that hangs in the kernel, was stopped, has ended or is cut off does not move."""

import argparse
import atexit
import os
import re
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from sat.helpers import print_rank0
from torch.distributed import distributed_c10d

from sat_ext.sat.settings import settings_of

BEAT = 2.0  # seconds
SILENT = 60.0  # seconds after which the first rank warns about another
ANSWER = 20.0  # seconds to find out who is gone; the first rank takes half of them
_LOST = re.compile(r"timed out|timeout|Connection \w+ by peer|Broken pipe|Connection refused", re.I)

_peers: "_Peers | None" = None
_limit = timedelta()


def timeout(args: argparse.Namespace) -> bool:
    """Symptom: SAT starts its process groups with NCCL's limit of 10 minutes, and a first rank that works alone
    for longer, as where CogVideo samples 1.5 in an evaluation, ends the run."""
    set_limit(timedelta(minutes=settings_of(args).timeout_minutes))
    begin()
    return True


def set_limit(limit: timedelta) -> None:
    """Set the timeout of every process group, present and future."""
    global _limit
    _limit = limit
    module: Any = distributed_c10d
    module.default_pg_timeout = limit  # read whenever a group is made without one
    if module.default_pg_nccl_timeout is not None:  # where PyTorch has NCCL
        module.default_pg_nccl_timeout = limit
    if dist.is_initialized():  # by SAT or CogVideo, before our data class is loaded
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(limit, group)


def begin() -> None:
    """Start this rank's counter if there are other ranks. Safe to call again."""
    global _peers
    if _peers is None and dist.is_initialized() and dist.get_world_size() > 1:
        _peers = _Peers()


def sentence_of_lost(error: BaseException) -> str | None:
    """Which ranks are gone, if the error is that of a failed collective; None for any other error.

    Takes some seconds, to see whose counters still move."""
    text = " ".join(str(error).split())
    ours = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    if not ours or not _LOST.search(text) or not dist.is_initialized():
        return None
    if who := _peers.gone() if _peers else "":
        reason = f"no sign of {who}, which ended, hangs or is cut off; check the end of its log, and its network"
    else:
        limit = f"args.timeout_minutes, {_limit.total_seconds() / 60:g}" if _limit else "their limit"
        reason = f"all ranks are alive; if one works alone for long, raise the limit ({limit})"
    return f"rank {dist.get_rank()} ({socket.gethostname()}) lost the others: {reason} ({text[:200]})."


class _Peers:
    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        shared: Any = distributed_c10d._get_default_store()
        self.store = shared.clone()  # a collective that waits holds the lock of the other
        self.store.set_timeout(timedelta(seconds=10))
        self.store.set(f"sat_ext/host/{self.rank}", socket.gethostname())
        self._counts: list[int] = []
        self._seen: dict[int, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # Python crashes on exit if a daemon is inside one of PyTorch's calls

    def gone(self) -> str:
        """The ranks whose counters stand still, with their hosts; empty if all move."""
        answers = [f"rank 0 ({os.environ.get('MASTER_ADDR', 'the first host')}), where the ranks register"]

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(self._silent())

        # in a thread: `add` heeds no timeout, and if the store's machine is cut off it waits as long as TCP does
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER)
        return answers[-1]

    def _silent(self) -> str:
        before = self._read()
        time.sleep(2.5 * BEAT)
        silent = [r for r, (a, b) in enumerate(zip(before, self._read())) if a == b and r != self.rank]
        # the first rank to ask is right: those that end after it are not the cause
        names = ", ".join(map(self._name, silent))
        names = self.store.compare_set("sat_ext/lost", "", names).decode() if names else ""
        if self.rank == 0:
            time.sleep(2.5 * BEAT)  # the store ends with this process, and the others may still be reading
        return str(names)

    def _name(self, rank: int) -> str:
        key = f"sat_ext/host/{rank}"
        host = self.store.get(key).decode() if self.store.check([key]) else "a host that never answered"
        return f"rank {rank} ({host})"

    def _read(self) -> list[int]:
        return [self.store.add(f"sat_ext/beat/{rank}", 0) for rank in range(self.world)]

    def _run(self) -> None:
        while not self._end.wait(BEAT):
            try:
                self.store.add(f"sat_ext/beat/{self.rank}", 1)
                if self.rank == 0:
                    self._watch()
            except RuntimeError:  # the store is gone: the collective that waits will fail and say so
                continue

    def _watch(self) -> None:
        """Name a silent rank long before a collective times out: NCCL then ends the process, and names nobody."""
        counts, now = self._read(), time.monotonic()
        for rank, count in enumerate(counts):
            if not self._counts or count != self._counts[rank]:
                self._seen[rank] = now
            elif now - self._seen[rank] > SILENT:
                self._seen[rank] = float("inf")  # warn once
                print_rank0(f"warning: no sign of {self._name(rank)} for {SILENT:.0f} s; it hangs or is cut off")
        self._counts = counts

    def _stop(self) -> None:
        self._end.set()
        self._thread.join(timeout=15)
