"""The files of examples/, with real ranks. Slurm and Kubernetes are stand-ins, as they are not here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sat_ext.demo_data import write_demo
from tests.sat.ranks import folder_of
from tests.sat.runs import write_config

ROOT = Path(__file__).parent.parent
SRUN = """#!/usr/bin/env bash
# two tasks of one node; each gets the signals of the step, and the highest status is the step's
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id SLURM_NTASKS=2 "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
echo $$ > srun.pid
most=0
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
    [ "$status" -le "$most" ] || most=$status
done
exit "$most"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" != show ] && echo "$@" >> scontrol.log || echo localhost
"""


def start(command: list[str], folder: Path, **more: str) -> subprocess.Popen[bytes]:
    """`command` in `folder`, its output in `log`; our script is there, and stand-ins are on the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=(folder / "log").open("ab"), stderr=subprocess.STDOUT
    )


def until(found: object, log: Path) -> None:
    deadline = time.monotonic() + 600
    while not found():  # type: ignore[operator]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's YAML, its data, and the entry script."""
    write_demo(tmp_path / "data", clips=6, stills=6, held_out=2)
    options = {
        "train_iters": 200,
        "save_interval": 1000,
        "eval_interval": None,
        "valid_data": None,
        "log_interval": 1,
    }
    write_config(tmp_path / "data", tmp_path, save="runs", **options)
    (tmp_path / "0.yaml").rename(tmp_path / "my_run.yaml")
    (tmp_path / "train_video.py").symlink_to(ROOT / "train_video.py")
    return tmp_path


@pytest.mark.multiprocess
@pytest.mark.timeout(2400)
def test_a_job_of_slurms_saves_at_sigterm_is_put_back_and_goes_on(folder: Path) -> None:
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7", "MASTER_PORT": "29871"}
    command = ["bash", str(ROOT / "examples/slurm.sh"), "my_run.yaml"]
    log = folder / "log"
    run = start(command, folder, **job)
    until(lambda: re.search(r"iteration +2/", log.read_text()), log)
    os.kill(int((folder / "srun.pid").read_text()), signal.SIGTERM)  # of the step, as Slurm's --signal sends it
    assert run.wait(600) == 143, log.read_text()[-3000:]
    assert (folder / "scontrol.log").read_text() == "requeue 7\n"
    saved = int((folder_of(folder / "runs") / "latest").read_text())
    log.write_text("")
    run = start(command, folder, **job)
    until(lambda: re.search(rf"iteration +{saved + 2}/", log.read_text()), log)
    os.kill(int((folder / "srun.pid").read_text()), signal.SIGTERM)
    assert run.wait(600) == 143
    assert re.search(r"iteration +(\d+)/", log.read_text())[1] == str(saved + 1)  # type: ignore[index]


@pytest.mark.multiprocess
@pytest.mark.timeout(2400)
def test_a_pod_saves_at_sigterm_and_the_next_one_goes_on(folder: Path) -> None:
    job = yaml.safe_load((ROOT / "examples/kubernetes.yaml").read_text())
    replicas = job["spec"]["pytorchReplicaSpecs"]
    pod = replicas["Master"]["template"]["spec"]
    assert replicas["Worker"] == replicas["Master"]
    (container,) = pod["containers"]
    (script,) = container["args"]
    limit = int(re.search(r"--shutdown-timeout (\d+)", script)[1])  # type: ignore[index]
    assert pod["terminationGracePeriodSeconds"] > limit
    command = [*container["command"], script.replace("/opt/sat_ext/", f"{ROOT}/")]
    nodes = {
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "2",
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": "29872",
    }
    log = folder / "log"
    saved = 0
    for first in (1, None):
        log.write_text("")
        run = start(command, folder, **nodes)
        wanted = 3 if first else saved + 2
        until(lambda wanted=wanted: re.search(rf"iteration +{wanted}/", log.read_text()), log)  # type: ignore[misc]
        run.send_signal(signal.SIGTERM)
        run.wait(600)
        begun = int(re.search(r"iteration +(\d+)/", log.read_text())[1])  # type: ignore[index]
        assert begun == (1 if first else saved + 1)
        saved = int((folder_of(folder / "runs") / "latest").read_text())
        assert saved >= wanted
