"""Every file of configs/zero/ trains on 2 CPU ranks, with the losses of ZeRO-1."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from sat_ext.errors import ConfigError
from sat_ext.sat.fixes.optimizer_path import optimizer_path
from sat_ext.zero import ZERO_NAMES, zero_section
from tests.sat.ranks import Running, Server, finish, folder_of
from tests.sat.runs import QUICK

Configure = Callable[..., list[str]]
OPS = "DEEPSPEED_OPS" in os.environ
NO_OPS = "DEEPSPEED_OPS is not set: DeepSpeed compiles for minutes, at its first use"


def start(server: Server, configure: Configure, folder: Path, name: str, **deepspeed: Any) -> Running:
    """A run of the small model with the file's section, in fp32, by torch's Adam unless `deepspeed` says other."""
    section = {**zero_section(name), "bf16": {"enabled": False}}
    del section["optimizer"]
    section |= deepspeed
    if name == "zero3-nvme":
        for part in ("offload_optimizer", "offload_param"):
            section["zero_optimization"][part]["nvme_path"] = str(folder)
    if name == "zero3-2nodes":
        section["zero_optimization"]["zero_hpz_partition_size"] = 2  # the GPUs of the one node here
    checkpoint = "weights" if name == "zero3-nvme" else "full"
    files = configure(folder, checkpoint=checkpoint, **QUICK)
    more = folder / "zero.yaml"
    more.write_text(json.dumps({"deepspeed": section}))
    return server.start([*files, str(more)], world=2, folder=folder / name)


@pytest.fixture(scope="module")
def reference(server: Server, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    run = start(server, configure, tmp_path_factory.mktemp("zero1"), "zero1")
    finish(run)
    return losses(run)


def losses(run: Running) -> list[list[float]]:
    return [[float.fromhex(r["loss"]) for r in run.records(rank)] for rank in range(2)]


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [n for n in ZERO_NAMES if n != "zero1"])
def test_a_config_trains_as_zero1_does(
    server: Server, configure: Configure, reference: list[list[float]], tmp_path: Path, name: str
) -> None:
    if name == "zero3-nvme" and not OPS:
        pytest.skip(f"{NO_OPS}, its reader and writer of disks")
    if name == "zero3-nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is not installed, without which DeepSpeed does not swap to a disk")
    run = start(server, configure, tmp_path, name)
    finish(run)
    for found, expected in zip(losses(run), reference, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert (folder_of(tmp_path / "save") / "latest").read_text() == "4"


@pytest.mark.multiprocess
def test_offload_updates_with_deepspeeds_adam_for_the_cpu(
    server: Server, configure: Configure, reference: list[list[float]], tmp_path: Path
) -> None:
    if not OPS:
        pytest.skip(f"{NO_OPS}, its Adam for the CPU")
    section = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False, "lr": 1e-3}}}
    run = start(server, configure, tmp_path, "zero2-offload", **section)
    finish(run)
    assert "DeepSpeedCPUAdam" in {r["optimizer"] for r in run.records()}
    for found, expected in zip(losses(run), reference, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.multiprocess
def test_an_optimizer_is_taken_by_its_path_and_its_state_comes_back(
    server: Server, configure: Configure, tmp_path: Path
) -> None:
    optimizer = {"type": "torch.optim.RAdam", "params": {"lr": 1e-3, "betas": [0.8, 0.9]}}
    run = start(server, configure, tmp_path, "zero2", optimizer=optimizer)
    finish(run)
    assert {r["optimizer"] for r in run.records()} == {"RAdam"}
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": optimizer}}))
    options = {**QUICK, "train_iters": 6, "load": str(folder_of(tmp_path / "save"))}
    resumed = server.start([*configure(tmp_path, **options), str(more)], world=2, folder=tmp_path / "on")
    finish(resumed)
    assert [r["iteration"] for r in resumed.records()] == [4, 5]
    assert "begin anew" not in resumed.log()


@pytest.mark.multiprocess
def test_an_optimizer_by_its_path_runs_on_the_cpu_under_offload(
    server: Server, configure: Configure, tmp_path: Path
) -> None:
    optimizer = {"type": "torch.optim.RAdam", "params": {"lr": 1e-3}}
    run = start(server, configure, tmp_path, "zero2-offload", optimizer=optimizer)
    finish(run)
    assert {r["optimizer"] for r in run.records()} == {"RAdam"}


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        (
            {"optimizer": {"type": "bitsandbites.optim.AdamW8bit"}},
            "imported .* pip install bitsandbites",
        ),
        ({"optimizer": {"type": "torch.optim.Adamw"}}, "'torch.optim.Adamw' cannot be imported"),
        ({"optimizer": {"type": "torch.nn.Linear"}}, "is not a torch.optim.Optimizer; name one"),
        (
            {"optimizer": {"type": "torch.optim.RAdam", "params": {"momentum": 1}}},
            "deepspeed.optimizer.params: torch.optim.RAdam takes no 'momentum'; it takes params, lr, betas",
        ),
        (
            {
                "optimizer": {"type": "bitsandbytes.optim.AdamW8bit"},
                "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
            },
            "updates on the GPU, and zero_optimization.offload_optimizer keeps its states on the CPU",
        ),
        ({"optimizer": {"type": "bitsandbytes.optim.AdamW8bit"}}, "updates on the GPU, and there is none"),
    ],
)
def test_an_optimizer_that_cannot_be_is_told(deepspeed: dict[str, Any], message: str) -> None:
    if "bitsandbytes" in str(deepspeed):
        pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=message):
        optimizer_path(Namespace(deepspeed_config=deepspeed))
