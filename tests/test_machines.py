"""Runs on two machines, which are namespaces of this one: real launchers, ranks, sockets and mounts.

`deepspeed --hostfile` reaches them through stand-ins for `ssh` and `pdsh` that enter the namespaces; no sshd runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sat_ext.demo_data import write_demo
from tests.machines import Machines, two_machines
from tests.sat.ranks import Server, finish, folder_of, records_in
from tests.sat.runs import write_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(1800)]

Records = list[list[dict[str, Any]]]  # of each rank: the keys and the loss of each step

LIMIT = 600  # seconds: enough on a busy machine, and less than the 15 minutes after which TCP itself gives up
OPTIONS = {  # of a run whose steps do not depend on how many there are
    "lr_decay_style": "constant", "warmup": 0.0, "save_interval": 2, "eval_interval": None, "valid_data": None,
    "num_workers": 1, "prefetch_factor": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    write_demo(folder / "data", clips=6, stills=6, held_out=2)
    with two_machines(folder / "shared", folder / "data") as machines:
        yield machines


@pytest.fixture(scope="module")
def alone(server: Server, machines: Machines) -> Records:
    """What 2 ranks of one machine record in 6 steps."""
    folder = machines.shared / "alone"
    run = server.start(configure(machines, "alone", train_iters=6), world=2, folder=folder)
    finish(run)
    return [run.records(rank) for rank in range(2)]


def configure(machines: Machines, name: str, **options: Any) -> list[str]:
    """Arguments of a run in the folder `name` that all share."""
    return write_config(machines.data, machines.shared / name, **{**OPTIONS, **options})


def torchrun(machines: Machines, name: str, meeting: str, **options: Any) -> list[Any]:
    """The launchers of one rank on each machine; `{}` of `meeting` is the machine's number."""
    rank = ["--nproc_per_node", "1", "-m", "tests.recorded", *configure(machines, name, **options)]
    return [
        machines.start(n, ["torchrun", "--nnodes", "2", *meeting.format(n - 1).split(), *rank], folder)
        for n in (1, 2)
        for folder in [machines.shared / name]
    ]


def logs(folder: Path) -> str:
    return "\n".join(file.read_text()[-4000:] for file in sorted(folder.glob("*.log")))


def test_the_machines_have_nothing_in_common_but_a_folder_and_a_cable(machines: Machines) -> None:
    look = (
        f"hostname; hostname -I; stat -c %Y {machines.data}/train; ls -A /tmp/home /dev/shm; touch ~/a /dev/shm/a"
    )
    first, second = (machines.call(n, "bash", "-c", look).split() for n in (1, 2))
    assert (first[:2], second[:2]) == (["machine1", "10.7.7.1"], ["machine2", "10.7.7.2"])
    assert first[2] != second[2]
    assert first[3:] == second[3:] == ["/dev/shm:", "/tmp/home:"]


def test_torchrun_trains_on_two_machines_as_on_one(server: Server, machines: Machines, alone: Records) -> None:
    folder, index = machines.shared / "torchrun", machines.data / "train" / ".sat_ext"
    machines.call(1, "rm", "-rf", index)
    nodes = torchrun(machines, "torchrun", "--rdzv_backend c10d --rdzv_endpoint machine1:29500", train_iters=4)
    assert [node.wait(LIMIT) for node in nodes] == [0, 0], logs(folder)
    assert [records_in(folder, rank) for rank in range(2)] == [steps[:4] for steps in alone]

    probed = [(folder / f"probed{rank}.txt").read_text().split() for rank in range(2)]
    assert [len(paths) for paths in probed] == [6, 6]
    assert len({*probed[0], *probed[1]}) == 12  # each file by one of them
    found = [machines.call(n, "find", machines.data / "train", "-name", "index.arrow") for n in (1, 2)]
    assert found == [f"{index}/index.arrow\n", ""]

    load = str(folder_of(folder / "save"))
    resumed = server.start(
        configure(machines, "torchrun", train_iters=6, load=load), world=2, folder=machines.shared / "on"
    )
    finish(resumed)
    assert [resumed.records(rank) for rank in range(2)] == [steps[4:] for steps in alone]


def test_deepspeed_trains_on_the_machines_of_its_hostfile(machines: Machines, alone: Records) -> None:
    folder = machines.shared / "deepspeed"
    arguments = configure(machines, "deepspeed", train_iters=4)
    (folder / "hostfile").write_text("machine1 slots=1\nmachine2 slots=1\n")
    command = ["deepspeed", "--hostfile", "hostfile", "--module", "tests.recorded", *arguments]
    assert machines.start(0, command, folder).wait(LIMIT) == 0, logs(folder)
    assert [records_in(folder, rank) for rank in range(2)] == [steps[:4] for steps in alone]


def test_both_machines_end_when_the_cable_is_pulled(machines: Machines) -> None:
    folder = machines.shared / "cut"
    nodes = torchrun(
        machines, "cut", "--node_rank {} --master_addr machine1", train_iters=10**6, save_interval=10**6,
        timeout_minutes=0.5,
    )  # fmt: skip
    while len(records_in(folder, 1)) < 3:
        time.sleep(0.2)
        assert [node.poll() for node in nodes] == [None, None], logs(folder)
    with machines.unplugged():
        assert [node.wait(LIMIT) for node in nodes] == [1, 1], logs(folder)
    for own, other in ((0, 1), (1, 0)):
        log = (folder / f"{own + 1}.log").read_text()
        (sentence,) = [line for line in log.splitlines() if line.startswith("error: ")]
        assert sentence.startswith(
            f"error: rank {own} (machine{own + 1}) lost the others: no sign of rank {other} (machine{other + 1})"
        )
