"""Files that are not known yet are probed by all ranks: real processes with gloo."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sat_ext.data.index import probe_cache
from tests.sat.ranks import Server
from tests.sat.ranks import finish as finish_ranks
from tests.sat.runs import write_config

RANK = """
import hashlib, json, os, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from sat_ext.config import load
from sat_ext.data.index import build_index, probing
from sat_ext.data.params import DataConfig
from sat_ext.data.probe import probe
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import MediaError
from sat_ext.sat import probing as shared
from sat_ext.sat.broadcast import share_from_first_rank

rank, world, folder, mode = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
store = dist.FileStore(str(folder / f"store{time.time_ns() if world == 1 else sys.argv[5]}"), world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
probed = []
original = shared.probe_files

def look(path):
    if mode == "slow":
        time.sleep(0.05)
    if mode == "blind" and rank and path.endswith("7.png"):
        raise MediaError(path, "no such file")
    return probe(path)

def counted(paths, **options):
    paths = list(paths)
    probed.extend(paths)
    yield from original(paths, look=look, **options)

shared.probe_files = counted
if mode == "slow":
    shared.ROUND, probing._SAVE_EVERY = 4, 0.0
config = load(DataConfig, {"video_size": [64, 64], "max_num_frames": 9}, "data.params")
source = [SourceConfig(path=str(folder / "data"))]
index = share_from_first_rank(lambda: build_index(source, config, probe=shared.probe_on_all_ranks), heartbeat=0.1)
rows = index.table.to_pylist()
groups = [(str(g.bucket), g.rows.tolist()) for g in index.groups]
print(json.dumps([hashlib.sha256(repr((rows, groups, index.bad)).encode()).hexdigest(), probed, list(index.bad)]))
dist.barrier()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 stills and a file that is none."""
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for number in range(60):
        Image.new("RGB", (80 + number, 60), (200, 40, 90)).save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text(f"still {number}")
    (tmp_path / "data" / "bad.png").write_bytes(b"no image")
    (tmp_path / "data" / "bad.txt").write_text("nothing")
    return tmp_path


def start(folder: Path, world: int, mode: str = "plain") -> list[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    store = str(time.time_ns())
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(world), str(folder), mode, store],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(ranks: list[subprocess.Popen[str]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What each rank made of the index, what it probed, and the bad files."""
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert not any(p.returncode for p in ranks), "".join(err for _, err in outputs)
    return [tuple(json.loads(out.splitlines()[-1])) for out, _ in outputs]


def forget(folder: Path) -> None:
    (folder / "data" / ".sat_ext" / "index.arrow").unlink()


def test_ranks_share_the_probing_and_have_the_index_of_one(folder: Path) -> None:
    [(alone, probed, bad)] = finish(start(folder, 1))
    assert len(probed) == 61 and len(bad) == 1
    forget(folder)
    first, second = finish(start(folder, 2))
    assert first[0] == second[0] == alone
    assert len(set(first[1])) >= 31 and len(set(second[1])) == 30
    assert set(first[1]) | set(second[1]) == set(probed)
    assert [own[1] for own in finish(start(folder, 2))] == [[], []]


def test_what_only_another_rank_cannot_read_is_no_bad_file(folder: Path) -> None:
    [(alone, _, _)] = finish(start(folder, 1))
    forget(folder)
    first, second = finish(start(folder, 2, "blind"))
    assert first[0] == second[0] == alone


def test_a_killed_run_goes_on_where_it_was(folder: Path) -> None:
    ranks = start(folder, 2, "slow")
    kept = folder / "data" / ".sat_ext" / "index.arrow"
    while not kept.exists():
        assert all(process.poll() is None for process in ranks)
        time.sleep(0.01)
    for process in ranks:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    first, second = finish(start(folder, 2))
    assert 0 < len({*first[1], *second[1]}) < 61
    forget(folder)
    [(alone, _, _)] = finish(start(folder, 1))
    assert first[0] == second[0] == alone


@pytest.mark.multiprocess
def test_check_under_a_launcher_probes_ahead_of_the_run(server: Server, demo: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo, tmp_path / "data"))
    files = write_config(data, tmp_path / "run")
    run = server.start(["check", *files], world=2, folder=tmp_path / "logs", cli=True)
    finish_ranks(run)
    assert run.log().count("28 files: 16 clips") == 1  # said by the first rank alone
    for part, count in (("train", 20), ("heldout", 8)):
        assert probe_cache.load(str(data / part)).num_rows == count
