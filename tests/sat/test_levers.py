"""A LoRA over quantized, swapped blocks, whose inputs are offloaded, trains and resumes under DeepSpeed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.sat.ranks import Server, finish, folder_of
from tests.sat.runs import MODEL, QUICK

WEIGHT = "network.transformer_blocks.{}.ff.net.2.weight"


def levers(folder: Path, quantization: str, **train: Any) -> str:
    """A YAML over the small run's."""
    model = {
        "transformer": {**MODEL["transformer"], "num_layers": 4},
        "train": {"mode": "lora", "rank": 4, "alpha": 4, "quantization": quantization, **train},
        "gradient_checkpointing": {"every": 1, "offload": True},
        "block_swap": 3,
        "text": {**MODEL["text"], "device": "cpu"},
        "sampling": {"number": 1, "steps": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "levers.yaml"
    file.write_text(yaml.safe_dump({"model": model, "deepspeed": {"bf16": {"enabled": True}}}))
    return str(file)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("quantization", "train"),
    [("nf4", {}), ("fp8", {"target_modules": "all-linear", "rslora": True, "dora": True})],
    ids=["nf4", "fp8 and dora"],
)
def test_a_lora_under_all_levers_resumes_bit_for_bit(
    server: Server, configure: Any, tmp_path: Path, quantization: str, train: dict[str, Any]
) -> None:
    more = levers(tmp_path / "yaml", quantization, **train)
    options = {"stage": 2, **QUICK}
    whole = server.start([*configure(tmp_path, **options), more], world=2, folder=tmp_path / "whole")
    finish(whole)
    assert len({record["loss"] for record in whole.records()}) == 4

    saved = folder_of(tmp_path / "save")
    state = torch.load(saved / "4" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    weight = WEIGHT.replace(".weight", ".base_layer.weight") if train else WEIGHT
    shapes = {state[weight.format(block)].shape for block in range(4)}
    assert shapes == {torch.Size([32, 128])}  # whole, of swapped and other blocks alike
    assert any("lora_B" in name and value.any() for name, value in state.items())
    assert any("magnitude" in name for name in state) == ("dora" in train)

    half_way = tmp_path / "half-way"
    shutil.copytree(saved, half_way)
    shutil.rmtree(half_way / "4")
    (half_way / "latest").write_text("2")
    arguments = configure(tmp_path / "on", load=str(half_way), **options)
    resumed = server.start([*arguments, more], world=2, folder=tmp_path / "resumed")
    finish(resumed)
    for rank in range(2):
        assert resumed.records(rank) == whole.records(rank)[2:]


@pytest.mark.multiprocess
def test_an_evaluation_under_all_levers_writes_samples(server: Server, configure: Any, tmp_path: Path) -> None:
    options = {**QUICK, "stage": 1, "train_iters": 2, "eval_interval": 2}
    options.pop("valid_data")
    arguments = configure(tmp_path, **options)
    finish(server.start([*arguments, levers(tmp_path / "yaml", "nf4")], world=1, folder=tmp_path / "on"), (0,))
    assert list(folder_of(tmp_path / "save").glob("samples/*.png"))
