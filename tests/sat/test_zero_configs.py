"""Every file of configs/zero/ trains on 2 CPU ranks, with the losses of ZeRO-1."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.builder import OpBuilder

from sat_ext.errors import ConfigError
from sat_ext.sat.checkpoint.optimizer_state import place_steps
from sat_ext.zero import ZERO_NAMES, fill_in_auto
from tests.sat.ranks import Running, Server, finish, folder_of
from tests.sat.repairs import repair
from tests.sat.runs import QUICK
from tests.zero import zero_section

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
    # "fused" is of the file's own Adam
    optimizer = {"type": "torch.optim.RAdam", "params": {"lr": 1e-3, "betas": [0.8, 0.9], "fused": True}}
    run = start(server, configure, tmp_path, "zero2", optimizer=optimizer)
    finish(run)
    assert {r["optimizer"] for r in run.records()} == {"RAdam"}
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"deepspeed": {"zero_optimization": {"stage": 2}, "optimizer": optimizer}}))
    options = {**QUICK, "train_iters": 6, "load": str(folder_of(tmp_path / "save"))}
    resumed = server.start([*configure(tmp_path, **options), str(more)], world=2, folder=tmp_path / "on")
    finish(resumed)
    assert [r["iteration"] for r in resumed.records()] == [4, 5]
    assert "starts from zero" not in resumed.log()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [n for n in ZERO_NAMES if "nvme" not in n])
def test_no_file_has_deepspeed_compile_its_adam_unless_it_offloads(
    process_group: None, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    """DeepSpeed asks no device which class it builds, so what is built here is what a GPU's machine builds."""
    monkeypatch.setattr(OpBuilder, "load", lambda self, *_, **__: pytest.fail(f"{self.name} is compiled"))
    for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(variable, value)
    repair("no_compiler", Namespace())
    section = {**fill_in_auto(zero_section(name), 64), "bf16": {"enabled": precision == "bf16"}}
    section["zero_optimization"].pop("zero_hpz_partition_size", None)  # there is one rank
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    offloads = "offload" in name

    def build() -> Any:
        return deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=section, dist_init_required=False
        )[0]

    if offloads:
        with pytest.raises(pytest.fail.Exception, match="cpu_adam is compiled"):
            build()
        return
    engine = build()
    assert type(engine.basic_optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in engine.basic_optimizer.param_groups)
    for _ in range(2):
        loss = engine(torch.ones(1, 4, dtype=next(model.parameters()).dtype)).float().pow(2).mean()
        engine.backward(loss)
        engine.step()
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        ({"type": "AdamW"}, {"torch_adam": True, "fused": True}),
        ({"type": "AdamW", "params": {"torch_adam": False}}, {"torch_adam": False}),  # DeepSpeed's
        ({"type": "Lion"}, {}),
        ({"type": "SGD", "params": {"momentum": 0.9}}, {"fused": True, "momentum": 0.9}),
        ({"type": "RAdam"}, {}),
        ({"type": "sat.ops.FusedEmaAdam"}, {}),
    ],
)
def test_another_optimizer_over_a_file_is_not_given_the_parameters_of_its_adam(
    optimizer: dict[str, Any], kept: dict[str, Any]
) -> None:
    section = zero_section("zero1")
    params = {**section["optimizer"]["params"], **optimizer.get("params", {})}
    config = {**section, "optimizer": {**optimizer, "params": params}}
    repair("optimizer_path", Namespace(deepspeed_config=config))
    assert config["optimizer"]["params"] == kept


def test_a_fused_adam_counts_its_steps_where_its_weights_are() -> None:
    """The device "meta" stands in for a GPU."""
    weight = torch.zeros(2, device="meta", requires_grad=True)
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, device="meta")}
    place_steps(optimizer)
    assert optimizer.state[weight]["step"].device.type == "cpu"
    optimizer.param_groups[0]["fused"] = True
    place_steps(optimizer)
    assert optimizer.state[weight]["step"].device.type == "meta"


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
        repair("optimizer_path", Namespace(deepspeed_config=deepspeed))
