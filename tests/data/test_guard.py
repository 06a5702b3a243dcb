"""The guard: whatever happens in its process, the caller gets a result or a MediaError, and nothing is left."""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from sat_ext.data.guard import Guard
from sat_ext.errors import ConfigError, MediaError


def work(path: str, what: str = "path", value: Any = None) -> Any:
    """In place of a reader; `what` says what the file makes it do."""
    match what:
        case "path":
            return path
        case "pid":
            return os.getpid()
        case "sleep":
            time.sleep(value)
        case "signal":
            os.kill(os.getpid(), value)
        case "segv":
            ctypes.string_at(0)
        case "exit":
            os._exit(value)
        case "allocate":
            return len(np.zeros(value, np.uint8))
        case "torch":
            return torch.empty(value, dtype=torch.uint8).numel()
        case "raise":
            raise value
        case "array":
            return np.full(value, 7, np.uint8)
        case "threads":
            return torch.get_num_threads()
        case "files":
            return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def guard() -> Iterator[Guard[Any]]:
    with Guard(work, timeout=20, capacity=1 << 20) as guard:
        yield guard


def is_alive(pid: int) -> bool:
    """Zombies count as alive: nobody has reaped them."""
    return Path(f"/proc/{pid}").exists()


def eventually(condition: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_calls_are_made_in_one_other_process(guard: Guard[Any]) -> None:
    assert guard("a.mp4") == "a.mp4"
    first = guard("a.mp4", "pid")
    assert first == guard.pid != os.getpid()
    assert guard("b.mp4", "pid") == first
    assert guard("b.mp4", "threads") == 1


def test_a_file_that_takes_too_long_is_given_up_and_the_process_replaced() -> None:
    with Guard(work, timeout=3) as guard:
        hung = guard("a.mp4", "pid")
        with pytest.raises(
            MediaError,
            match=r"^a\.mp4: reading it took longer than 3 s \(data\.params\.on_bad_sample\.timeout\)$",
        ):
            guard("a.mp4", "sleep", 60)
        assert not is_alive(hung)
        assert guard("b.mp4", "pid") != hung


@pytest.mark.parametrize(
    ("what", "value", "fate"),
    [
        ("segv", None, "was ended by SIGSEGV"),
        ("signal", signal.SIGABRT, "was ended by SIGABRT"),
        ("signal", signal.SIGALRM, "was ended by SIGALRM"),  # its own; the time limit of these tests uses it too
        ("signal", signal.SIGKILL, "was ended by SIGKILL, perhaps by the kernel for lack of memory"),
        ("exit", 3, "ended with exit code 3"),
    ],
)
def test_a_crash_is_an_error_that_names_the_file_and_the_signal(
    guard: Guard[Any], what: str, value: Any, fate: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MediaError, match=f"^a.mp4: the process that read it {fate}$"):
        guard("a.mp4", what, value)
    assert guard("b.mp4") == "b.mp4"
    assert capfd.readouterr().err == ""  # no dump of the process's stack for each bad file


class Torn:
    """A pipe whose other end goes while an answer is read."""

    def __init__(self, pipe: Any) -> None:
        self.send, self.poll = pipe.send, pipe.poll

    def recv(self) -> Any:
        raise OSError("got end of file during message")


def test_an_end_amid_an_answer_is_an_error_that_names_the_file(guard: Guard[Any]) -> None:
    guard("a.mp4")
    guard._pipe = Torn(guard._pipe)  # type: ignore[assignment]
    with pytest.raises(MediaError, match=r"^b\.mp4: the process that read it was ended by SIGKILL"):
        guard("b.mp4")
    assert guard("c.mp4") == "c.mp4"


@pytest.mark.parametrize("what", ["allocate", "torch"])
def test_memory_beyond_the_limit_is_refused(what: str) -> None:
    with Guard(work, timeout=20, memory=256 << 20) as guard:
        assert guard("a.png", what, 64 << 20) == 64 << 20
        process = guard.pid
        with pytest.raises(MediaError, match="^b.png: reading it takes more memory than a file may$"):
            guard("b.png", what, 512 << 20)
        assert guard("c.png", "pid") == process


def test_errors_come_back_as_they_were_raised(guard: Guard[Any]) -> None:
    with pytest.raises(MediaError, match="^a.png: the file is empty$") as caught:
        guard("a.png", "raise", MediaError("a.png", "the file is empty"))
    assert (caught.value.path, caught.value.reason) == ("a.png", "the file is empty")
    with pytest.raises(ConfigError, match="^decoder: no$"):
        guard("a.png", "raise", ConfigError("decoder: no"))


def test_what_a_parser_stumbles_over_counts_as_the_files_fault(guard: Guard[Any]) -> None:
    with pytest.raises(MediaError, match="^a.png: cannot be read: IndexError: list index out of range$"):
        guard("a.png", "raise", IndexError("list index out of range\nand more"))
    with pytest.raises(MediaError, match="exit code"):
        guard("a.png", "raise", SystemExit(4))


def test_arrays_come_back_in_shared_memory_until_released(guard: Guard[Any]) -> None:
    first, second = guard("a", "array", (3, 100)), guard("b", "array", (100_000,))
    first[:] = 1
    assert (second == 7).all()
    third = guard("c", "array", 1 << 20)  # finds no room beside them
    assert (first == 1).all() and (second == 7).all() and (third == 7).all()
    assert all(a.flags.writeable for a in (first, second, third))
    guard.release()
    again = guard("d", "array", (3, 100))
    assert np.shares_memory(first, again)
    assert not np.shares_memory(third, again)


def test_arrays_outlive_the_process_and_the_guard() -> None:
    guard = Guard(work, timeout=20, capacity=4096)
    array = guard("a", "array", 100)
    with pytest.raises(MediaError):
        guard("b", "exit", 1)
    other = guard("c", "array", 100)
    guard.close()
    del guard
    assert (array == 7).all() and (other == 7).all()


def test_a_process_that_died_between_calls_is_nobodys_fault(guard: Guard[Any]) -> None:
    pid = guard("a", "pid")
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert guard("b") == "b"


def test_closing_leaves_neither_process_nor_files() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pids = []
    for _ in range(5):
        with Guard(work, timeout=20) as guard:
            pids.append(guard("a", "pid"))
            with pytest.raises(MediaError):
                guard("a", "exit", 1)
            pids.append(guard("a", "pid"))
            assert guard("a", "files") < before + 10
        guard.close()  # twice does no harm
    forgotten = Guard(work, timeout=20)
    pids.append(forgotten("a", "pid"))
    del forgotten
    assert not any(is_alive(pid) for pid in pids)
    assert len(os.listdir("/proc/self/fd")) == before


def test_guards_of_several_threads_do_not_wait_for_each_other() -> None:
    lonely = threading.Barrier(4, timeout=20)  # all four processes run at once, or it breaks

    def one(number: int) -> list[int]:
        with Guard(work, timeout=20) as guard:
            lonely.wait()
            results = [guard(str(number), "pid") for _ in range(20)]
            with pytest.raises(MediaError, match="exit code 1"):
                guard("a", "exit", 1)
            return results

    with ThreadPoolExecutor(4) as pool:
        pids = [set(r) for r in pool.map(one, range(4))]
    assert all(len(p) == 1 for p in pids)
    assert len(set.union(*pids)) == 4


def test_a_guard_made_in_one_thread_serves_another() -> None:
    guard = Guard(work, timeout=20)
    pids: list[int] = []
    thread = threading.Thread(target=lambda: pids.append(guard("a", "pid")))
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert guard("b", "pid") == pids[0]  # the process does not end with the thread that started it
    guard.close()


class Pids(IterableDataset):  # type: ignore[type-arg]
    """Who reads, and for whom, as seen in a data worker."""

    def __init__(self, guard: Guard[Any]) -> None:
        self.guard = guard

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for _ in range(4):
            yield os.getpid(), self.guard("a", "pid")


def test_every_data_worker_has_its_own_process_and_takes_it_along(guard: Guard[Any]) -> None:
    mine = guard("a", "pid")
    seen = {tuple(pair) for pair in DataLoader(Pids(guard), batch_size=None, num_workers=2)}
    workers, readers = {w for w, _ in seen}, {r for _, r in seen}
    assert len(workers) == len(readers) == 2
    assert mine not in readers and not workers & readers
    assert eventually(lambda: not any(is_alive(r) for r in readers))
    assert guard("a", "pid") == mine


SCRIPT = """
import os, signal, sys, time
from sat_ext.data.guard import Guard

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with it ignored

def work(path):
    if path == "pid":
        return os.getpid()
    time.sleep(600)

guard = Guard(work, timeout=600)
print(guard("pid"), flush=True)
try:
    guard("hangs")
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_with_its_parent_even_while_a_file_hangs(number: signal.Signals) -> None:
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    )
    assert parent.stdout is not None
    reader = int(parent.stdout.readline())
    time.sleep(0.1)
    os.killpg(parent.pid, number) if number == signal.SIGINT else parent.send_signal(number)  # as Ctrl-C does
    _, errors = parent.communicate(timeout=20)
    assert eventually(lambda: not is_alive(reader) or is_zombie(reader))
    assert "Traceback" not in errors


def is_zombie(pid: int) -> bool:
    """An orphan that ended, where no init process reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_guard_does_not_travel() -> None:
    with pytest.raises(TypeError, match="a guard belongs to the process that made it"):
        pickle.dumps(Guard(work, timeout=1))


def test_what_a_parser_stumbled_over_can_be_found_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The log is written in the other process, so a file is what shows it."""
    logger = logging.getLogger("sat_ext.data.guard")
    read, write = os.pipe()
    handler = logging.StreamHandler(os.fdopen(write, "w"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with Guard(work, timeout=20) as guard, pytest.raises(MediaError):
            guard("a.png", "raise", IndexError("out"))
        assert b"in work\n    raise value\nIndexError: out" in os.read(read, 10_000)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        handler.stream.close()
        os.close(read)
