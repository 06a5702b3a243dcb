"""CogVideo's unmodified script under ZeRO-3: the losses and files of ZeRO-2, from a model that is never whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkout, Launch, Run

from sat_ext.checkpoint.reading import read_file

pytestmark = pytest.mark.multiprocess
# in 1.0 with learned positions, which a mixin of the network reads without being called
MODEL = {"1.0": ("cogvideox_5b_i2v", ["joint", "i2v"]), "1.5": ("cogvideox1.5_5b_i2v", ["joint", "i2v", "1.5"])}
LORA = {
    "1.0": ("cogvideox_5b_i2v_lora", ["joint", "i2v"]),
    "1.5": ("cogvideox1.5_5b_i2v", ["joint", "i2v", "1.5", "lora"]),
}
WEIGHTS: dict[str, Any] = {"checkpoint": "weights", "keep_last": None, "eval_interval": None}


def settings(stage: int) -> dict[str, Any]:
    """In fp32, where the order in which gradients are added shows in the last digits alone."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"deepspeed": {"bf16": {"enabled": False}, "zero_optimization": zero}}


@pytest.fixture(scope="module")
def runs(checkout: Checkout, launch: Launch) -> dict[int, Run]:
    """Two steps on two ranks, from the base weights, by ZeRO stage."""
    model, overlays = MODEL[checkout.generation]
    return {
        stage: launch(model, overlays, settings(stage), launcher="torchrun", train_iters=2, **WEIGHTS)
        for stage in (2, 3)
    }


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    file = run.folder / (run.folder / "latest").read_text() / "mp_rank_00_model_states.pt"
    weights: dict[str, torch.Tensor] = read_file(file)["module"]
    return weights


def test_the_losses_are_those_of_zero_2(runs: dict[int, Run]) -> None:
    for rank in (0, 1):
        expected = runs[2].losses(rank)
        assert len(expected) == 2
        assert expected[0] != expected[1]
        assert runs[3].losses(rank) == pytest.approx(expected, rel=1e-4)


def test_one_whole_file_holds_what_that_of_zero_2_holds(runs: dict[int, Run]) -> None:
    whole, gathered = weights_of(runs[2]), weights_of(runs[3])
    encoders = {name for name in whole if name.startswith(("conditioner.", "first_stage_model."))}
    shapes = {name: weight.shape for name, weight in whole.items() if name not in encoders}
    assert {name: weight.shape for name, weight in gathered.items()} == shapes
    for name, weight in gathered.items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-3)  # a step of Adam is 1e-3
    assert sorted(p.name for p in (runs[3].folder / "2").iterdir()) == ["mp_rank_00_model_states.pt"]


def test_the_file_is_gone_on_with_under_either_stage(
    checkout: Checkout, launch: Launch, runs: dict[int, Run], tmp_path: Path
) -> None:
    model, overlays = MODEL[checkout.generation]
    load: dict[str, Any] = {"load": str(runs[3].folder), "mode": "pretrain", "force_train": False}
    own = [{**load, "save": str(tmp_path / str(stage)), "train_iters": 3} for stage in (2, 3)]
    two, three = [
        launch(model, overlays, settings(stage), **args, **WEIGHTS).losses()
        for stage, args in zip((2, 3), own, strict=True)
    ]
    assert len(two) == 1
    assert three == pytest.approx(two, rel=1e-5)


def test_lora_begins_from_the_base_weights(checkout: Checkout, launch: Launch, runs: dict[int, Run]) -> None:
    model, overlays = LORA[checkout.generation]
    base = checkout.tiny / MODEL[checkout.generation][0] / "transformer"
    run = launch(
        model, overlays, settings(3), launcher="torchrun", train_iters=1, load=str(base), **WEIGHTS
    )  # fmt: skip
    assert run.losses() == pytest.approx(runs[3].losses()[:1], rel=1e-5)  # LoRA adds zero before its first step


def test_without_the_repairs_sats_layers_cannot_be_built(checkout: Checkout, launch: Launch) -> None:
    model, overlays = MODEL[checkout.generation]
    run = launch(
        model, overlays, settings(3), fails=True, without_fixes=["parallel_layers", "zero3_build"], **WEIGHTS
    )  # fmt: skip
    assert "got multiple values for argument 'module'" in run.log
