"""The files of configs/zero/ merge behind CogVideo's own, whose section they change in part, and train."""

from __future__ import annotations

import math

import pytest
from conftest import Checkout, Launch

from sat_ext.zero import ZERO

pytestmark = pytest.mark.multiprocess
T2V = {"1.0": ("cogvideox_2b", ["joint"]), "1.5": ("cogvideox1.5_5b", ["joint", "1.5"])}


@pytest.mark.parametrize("name", ["zero2-offload", "zero3-offload"])
def test_a_config_trains_behind_cogvideos_own(name: str, checkout: Checkout, launch: Launch) -> None:
    model, overlays = T2V[checkout.generation]
    settings = {"deepspeed": {"zero_optimization": ZERO[name]}}
    run = launch(
        model, overlays, settings, launcher="deepspeed", train_iters=2, valid_data=None, eval_interval=None,
        save_interval=2,
    )  # fmt: skip
    for rank in range(2):
        assert len(run.losses(rank)) == 2 and all(math.isfinite(loss) for loss in run.losses(rank))
    assert (run.folder / "latest").read_text() == "2"
