"""A source whose target is the base, in training runs: resumed bit for bit, on several ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_ext.cogvideo.network import LOSS
from sat_ext.errors import ConfigError
from sat_ext.recipe import read_recipe, recipe_of
from tests.sat.ranks import Server, finish, folder_of
from tests.sat.runs import MODEL, SAVE, STEPS

LORA = {"mode": "lora", "rank": 4, "alpha": 4}
QUIET = {"train_data": None, "valid_data": None, "eval_interval": None, "log_interval": 1}


def write_sources(demo: Path, file: Path, train: dict[str, object]) -> str:
    """Stills to learn from, and clips of the base's."""
    path = str(demo / "train")
    sources = [
        {"path": path, "name": "stills", "kind": "image", "share": 1},
        {"path": path, "name": "clips", "kind": "video", "share": 1, "target": "base"},
    ]
    sections = {"model": {**MODEL, "train": train}, "data": {"params": {"sources": sources}}}
    file.write_text(json.dumps(sections))
    return str(file)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_bit_for_bit(
    server: Server, demo: Path, configure: Callable[..., list[str]], tmp_path: Path, stage: int
) -> None:
    sources = write_sources(demo, tmp_path / "sources.yaml", LORA)
    options = {"stage": stage, "accumulate": 2, **QUIET}
    whole = server.start([*configure(tmp_path, **options), sources], world=2, folder=tmp_path / "whole")
    finish(whole)
    losses = [float(value) for value in re.findall(r"\bloss_base ([-+.\dE]+)", whole.log())]
    assert losses[0] < 1e-12 < losses[-1], losses
    save = folder_of(tmp_path / "save")
    (save / "latest").write_text(str(SAVE))
    files = configure(tmp_path, load=str(save), **options)
    resumed = server.start([*files, sources], world=2, folder=tmp_path / "on")
    finish(resumed)
    for rank in range(2):
        assert len(whole.records(rank)) == 2 * STEPS
        assert resumed.records(rank) == whole.records(rank)[2 * SAVE :]


def test_without_a_lora_it_is_refused(demo: Path, configure: Callable[..., list[str]], tmp_path: Path) -> None:
    files = [configure(tmp_path, **QUIET)[1], write_sources(demo, tmp_path / "sources.yaml", {"mode": "full"})]
    with pytest.raises(ConfigError) as error:
        read_recipe(files)
    assert str(error.value) == (
        "model.train.mode: full, but a source of data.params.sources has the target base, which is what the model "
        "predicts without its LoRA; append configs/train/lora.yaml, or take the target out."
    )


@pytest.mark.parametrize(
    ("network", "loss", "message"),
    [
        ({}, LOSS, "model.network_config.params.modules: no lora_config, but a source"),
        (
            {"lora_config": {"params": {"r": 4}}},
            "sgm.loss.Other",
            "model.loss_fn_config.target: CogVideo's own loss",
        ),
    ],
)
def test_cogvideos_engine_needs_its_lora_and_our_loss(network: dict[str, Any], loss: str, message: str) -> None:
    model = {"network_config": {"params": {"modules": network}}, "loss_fn_config": {"target": loss}}
    source = {"path": "clips", "target": "base"}
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        recipe_of({"model": model, "data": {"params": {"sources": [source]}}})
