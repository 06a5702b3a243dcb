"""What the first rank makes is on all ranks: over three real processes with gloo."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RANK = """
import os, sys, tempfile, time
from datetime import timedelta
from pathlib import Path
import numpy as np
import pyarrow as pa
import torch.distributed as dist
from sat_ext.errors import DataError
from sat_ext.sat.broadcast import share_from_first_rank

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
store = dist.FileStore(str(folder / "store"), 3)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=30))

def make(case):
    assert rank == 0
    if case == "error":
        raise DataError("clips: no media; add some.")
    if case == "slow":
        time.sleep(0.5)  # five heartbeats
    table = pa.table({"path": [f"clip {n}.mp4" for n in range(1000)], "captions": [["a", None]] * 1000})
    return {"table": table, "rows": np.arange(5_000_000, dtype=np.uint32), "none": np.zeros(0), "name": case}

def memory_of(array):
    address = array.__array_interface__["data"][0]
    for line in open("/proc/self/maps"):
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if low <= address < high:
            return "file" if "sat_ext-" in line else "private"

def full(*_):
    raise OSError(28, "No space left on device")

def check(result):
    table, rows = result["table"], result["rows"]
    table.validate(full=True)
    assert table["path"][999].as_py() == "clip 999.mp4" and table["captions"][3].as_py() == ["a", None]
    assert rows.sum(dtype=np.int64) == 5_000_000 * 4_999_999 // 2 and len(result["none"]) == 0
    return memory_of(rows)

allocate = os.posix_fallocate
for case in ("plain", "slow", "other machine", "full disk", "error"):
    # other machine: two ranks do not see the files of the first
    tempfile.tempdir = str(folder / ("b" if case == "other machine" and rank else "a"))
    os.posix_fallocate = full if case == "full disk" else allocate
    try:
        result = share_from_first_rank(lambda: make(case), heartbeat=0.1)
        assert result["name"] == case
        told = check(result)
    except DataError as error:
        told = str(error)
    dist.barrier()
    left = [p.name for name in "ab" for p in (folder / name).iterdir()]
    print(f"{case}: {told}, left: {left}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What each of three ranks printed, a line for each case."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [p.returncode for p in ranks] == [0, 0, 0], "".join(err for _, err in outputs)
    return [out.splitlines() for out, _ in outputs]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (0, "plain: file, left: []"),  # all map one file, which is gone by then
        (1, "slow: file, left: []"),
        (2, "other machine: file, left: []"),
        (3, "full disk: private, left: []"),
        (4, "error: clips: no media; add some., left: []"),
    ],
)
def test_every_rank_has_what_the_first_made(told: list[list[str]], case: int, said: str) -> None:
    assert [lines[case] for lines in told] == [said] * 3
