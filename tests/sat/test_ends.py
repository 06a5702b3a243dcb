"""How a run ends that cannot go on: in one sentence, and with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from sat_ext.errors import DataError
from sat_ext.sat.ends import Spared, end_workers
from sat_ext.sat.uncaught import sentence_of
from tests.sat.ranks import Server, folder_of
from tests.sat.runs import QUICK

SENTENCE = "2 files could not be read: a\nb.mp4: cannot be read: TypeError: no; mend or remove them"


class Stream(IterableDataset[dict[str, Any]]):
    """Batches until `end` is called."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.end = end

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"txt": ["a"]}
        self.end()


def end_of(end: Callable[[], None], workers: int) -> str:
    """What the training process says of what it gets after the first batch."""
    batches = iter(DataLoader(Stream(end), batch_size=None, num_workers=workers))
    assert next(batches) == {"txt": ["a"]}
    with pytest.raises((DataError, RuntimeError)) as caught:
        next(batches)
    sentence = sentence_of(caught.value)
    assert sentence
    return sentence


def spend() -> None:
    raise DataError(SENTENCE)


def fall() -> None:
    time.sleep(0.5)  # so that the first batch gets there
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [0, 1])
def test_what_ends_a_data_worker_is_told_in_its_own_words_alone(process_group: None, workers: int) -> None:
    assert end_of(spend, workers) == SENTENCE


@pytest.mark.multiprocess
def test_a_data_worker_that_is_killed_is_told_of_in_a_sentence(process_group: None) -> None:
    assert end_of(fall, 1).startswith(
        "a data worker of rank 0 was ended, perhaps by the kernel for want of memory; lower args.num_workers or "
        "args.prefetch_factor (DataLoader worker (pid"
    )


@pytest.mark.multiprocess
def test_sigterm_does_not_reach_a_data_worker_that_has_just_begun(process_group: None) -> None:
    batches: Any = iter(Spared(DataLoader(Stream(spend), batch_size=None, num_workers=1)))
    os.kill(batches._workers[0].pid, signal.SIGTERM)
    assert next(batches) == {"txt": ["a"]}
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    end_workers()


def test_an_error_of_the_code_is_not_made_a_sentence() -> None:
    assert sentence_of(RuntimeError("shapes do not fit")) is None


COMMAND = """
import subprocess, sys
subprocess.run([sys.executable, "launch.py", "deepspeed.launcher.launch"])
"""
LAUNCHER = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "rank.py"])

def end(*_):
    rank.kill()
    sys.exit(1)

signal.signal(signal.SIGTERM, end)
rank.wait()
"""
RANK = """
import os, time
from sat_ext.sat import fixes
print(os.getppid(), fixes.launcher(), flush=True)
time.sleep(60)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(("command", "ends"), [("deepspeed", True), ("my_scheduler", False)])
def test_the_ranks_end_with_the_deepspeed_command(tmp_path: Path, command: str, ends: bool) -> None:
    for name, script in ((command, COMMAND), ("launch.py", LAUNCHER), ("rank.py", RANK)):
        (tmp_path / name).write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "LOCAL_RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / command)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    launcher, watched = next(line for line in process.stdout if line[0].isdigit()).split()
    process.kill()
    process.wait()
    try:
        assert watched == str(ends)
        deadline = time.monotonic() + (10 if ends else 3)
        while is_running(int(launcher)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert is_running(int(launcher)) != ends
    finally:
        if is_running(int(launcher)):
            os.kill(int(launcher), signal.SIGTERM)


@pytest.mark.multiprocess
def test_a_data_worker_that_is_busy_does_not_hold_up_the_end(
    server: Server, configure: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = {**QUICK, "train_iters": 50, "save_interval": 50, "num_workers": 1, "prefetch_factor": 6}
    run = server.start(configure(tmp_path, **options), world=1, folder=tmp_path, slow=0.3, busy=8)
    deadline = time.monotonic() + 30
    while not (tmp_path / "busy").exists() or not run.records():  # some batches wait to be trained on
        assert time.monotonic() < deadline, run.log()
        time.sleep(0.02)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait(timeout=30) == [143], run.log()
    assert (folder_of(tmp_path / "save") / "latest").read_text() == str(len(run.records()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
