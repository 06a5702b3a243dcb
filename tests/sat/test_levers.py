"""A LoRA with every lever at once, under real DeepSpeed: it trains, saves, and goes on with the same losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sat_ext.models.checkpoint import read_file
from tests.models.conftest import write_pretrained
from tests.sat.ranks import Running, Server, finish, folder_of
from tests.sat.runs import QUICK

LEVERS = {
    "gradient_checkpointing": {"every": 1, "offload": True},
    "block_swap": 2,
    "text": {"device": "on_off"},
    "first_stage": {"tiling": True, "slicing": True, "frames": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pretrained(tmp_path_factory.mktemp("pretrained"), "5b-i2v")


def start(
    server: Server,
    configure: Callable[..., list[str]],
    tmp_path: Path,
    model: dict[str, Any],
    name: str,
    **args: Any,
) -> Running:
    files = configure(tmp_path, stage=2, **{**QUICK, **args})
    config = yaml.safe_load(Path(files[1]).read_text())
    config["model"] = model
    Path(files[1]).write_text(yaml.safe_dump(config))
    return server.start(files, world=2, folder=tmp_path / name)


@pytest.mark.multiprocess
@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_a_lora_with_every_lever_trains_and_goes_on(
    server: Server, configure: Callable[..., list[str]], folder: Path, tmp_path: Path, quantization: str
) -> None:
    pytest.importorskip("bitsandbytes")
    train = {"mode": "lora", "rank": 2, "alpha": 2, "quantization": quantization}
    model = {"pretrained": str(folder), "conditioning": "i2v", "train": train, **LEVERS}
    run = start(server, configure, tmp_path, model, "whole")
    finish(run)
    weights = read_file(folder_of(tmp_path / "save") / "4" / "mp_rank_00_model_states.pt")["module"]
    assert weights and all("lora_" in name and value.dtype == torch.float32 for name, value in weights.items())
    (folder_of(tmp_path / "save") / "latest").write_text("2")
    load = str(folder_of(tmp_path / "save"))
    resumed = start(server, configure, tmp_path, model, "on", load=load)
    finish(resumed)
    for rank in range(2):
        assert resumed.records(rank) == run.records(rank)[2:]
    if quantization == "none":
        plain = {
            "pretrained": str(folder),
            "conditioning": "i2v",
            "train": train,
            "first_stage": LEVERS["first_stage"],
        }
        same = start(server, configure, tmp_path / "plain", plain, "plain")
        finish(same)
        assert [same.records(rank) for rank in range(2)] == [run.records(rank) for rank in range(2)]
