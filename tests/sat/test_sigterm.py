"""How a run ends that cannot go on: in one sentence, and with nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sat import mpu
from torch.distributed import distributed_c10d
from torch.utils.data import DataLoader, IterableDataset

from sat_ext.errors import ConfigError, DataError
from sat_ext.sat import peers
from sat_ext.sat.excepthook import sentence_of
from sat_ext.sat.settings import NAMES, Settings
from sat_ext.sat.sigterm import end_workers, spared
from sat_ext.sat.steps import Begun
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
        "a data worker of rank 0 was killed, perhaps by the kernel for lack of memory; lower args.num_workers or "
        "args.prefetch_factor (DataLoader worker (pid"
    )


@pytest.mark.multiprocess
def test_sigterm_does_not_reach_a_data_worker_that_has_just_begun(process_group: None) -> None:
    batches: Any = iter(Begun(DataLoader(Stream(spend), batch_size=None, num_workers=1), spared))
    os.kill(batches._workers[0].pid, signal.SIGTERM)
    assert next(batches) == {"txt": ["a"]}
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    end_workers()


@pytest.mark.multiprocess
def test_a_rank_that_stops_answering_is_named(
    server: Server, configure: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Stopped, as a machine that is cut off looks to the others: they wait 12 s for it."""
    arguments = configure(tmp_path, **{**QUICK, "train_iters": 100000, "timeout_minutes": 0.2})
    run = server.start(arguments, world=3, folder=tmp_path, slow=0.05)
    try:
        while len(run.records(2)) < 3:
            time.sleep(0.2)
            assert run.alive(), run.log()[-3000:]
        os.kill(run.pids[1], signal.SIGSTOP)
        statuses = run.wait(timeout=300)
    finally:
        run.kill()
    assert (statuses[0], statuses[2]) == (1, 1)
    for rank in (0, 2):
        (sentence,) = [line for line in run.log(rank).splitlines() if line.startswith("error: ")]
        assert sentence.startswith(
            f"error: rank {rank} ({socket.gethostname()}) lost the others: no sign of rank 1 ("
        )
        assert "Traceback" not in run.log(rank)


@pytest.mark.multiprocess
def test_a_machine_without_the_data_is_named(
    server: Server, configure: Callable[..., list[str]], demo: Path, tmp_path: Path
) -> None:
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "mounted").symlink_to(demo / "train")
    arguments = configure(tmp_path, **{**QUICK, "train_data": ["mounted"]})
    run = server.start(arguments, world=2, folder=tmp_path, own_disks=True)
    assert run.wait() == [1, 1]
    for rank in range(2):
        assert (
            f"error: args.train_data: mounted does not exist on rank 1 ({socket.gethostname()}), but 1 of 2 ranks "
            "have it; a mount may be missing on that machine."
        ) in run.log(rank)


def test_the_time_limit_reaches_every_group(process_group: None) -> None:
    """Those that SAT and CogVideo have made before our data class is loaded, and those that come later."""
    before = distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout
    early = dist.new_group([0])
    try:
        peers.timeout(Namespace(**{**dict.fromkeys(NAMES), "timeout_minutes": 90.0}))
        groups = [dist.group.WORLD, early, mpu.get_data_parallel_group(), dist.new_group([0])]
        limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert limits == [timedelta(minutes=90)] * 4
    finally:
        distributed_c10d.default_pg_timeout, distributed_c10d.default_pg_nccl_timeout = before
    with pytest.raises(ConfigError, match=r"args\.timeout_minutes: 0\.0; use 0\.2 to 10080"):
        Settings(timeout_minutes=0.0)


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
from sat_ext.sat.fixes import launcher
print(os.getppid(), launcher.launcher(None), flush=True)
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
def test_the_ranks_end_with_torchrun(server: Server, configure: Callable[..., list[str]], tmp_path: Path) -> None:
    """Killed as the kernel does it for want of memory. The ranks save, and are gone."""
    script = Path(__file__).parents[2] / "train_video.py"
    arguments = configure(
        tmp_path, **{**QUICK, "train_iters": 100_000, "save_interval": 100_000, "log_interval": 1}
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen([*command, *arguments], env=environment, cwd=tmp_path, stdout=out, stderr=out)
    ranks: list[int] = []
    try:
        while (
            "elapsed time per iteration" not in log.read_text()
        ):  # SAT prints `iteration` among its arguments too
            time.sleep(0.2)
            assert process.poll() is None, log.read_text()[-3000:]
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(child) for child in children if "train_video" in Path(f"/proc/{child}/cmdline").read_text()]
        assert len(ranks) == 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 120
        while any(map(is_running, ranks)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_running, ranks)), log.read_text()[-3000:]
    finally:
        for pid in (process.pid, *ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert int((folder_of(tmp_path / "save") / "latest").read_text()) > 0


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


@pytest.mark.parametrize("small_disk", ["300k"], indirect=True)
@pytest.mark.multiprocess
def test_a_disk_that_fills_up_neither_hangs_nor_ends_a_run(
    server: Server, configure: Callable[..., list[str]], small_disk: Path, tmp_path: Path
) -> None:
    """Only its checkpoint cannot do without."""
    options = {"train_iters": 24, "save_interval": 100, "eval_interval": 2, "log_interval": 1}
    more = tmp_path / "more.yaml"
    more.write_text("model: {sampling: {number: 1, steps: 1}}\n")
    run = server.start([*configure(tmp_path, **options), str(more)], world=1, folder=tmp_path / "log", fill_at=0)
    assert run.wait() == [1], run.log()
    log = run.log()
    assert len(run.records()) == 24
    for name in ("training_config.yaml", "samples/", "heldout.jsonl", "TensorBoard's events", "memory.json"):
        assert log.count(f"warning: {name} cannot be written (No space left on device); training") == 1, name + log
    assert "error: the checkpoint of iteration 24 was not saved: rank 0 could not write" in log
    assert "Traceback" not in log
