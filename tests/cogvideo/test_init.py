"""What `sat-ext init --cogvideo` writes trains under CogVideo's unmodified script."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import yaml
from conftest import Checkout, Launch
from typer.testing import CliRunner

from sat_ext.cli.main import app
from sat_ext.starter import run as starter
from sat_ext.starter.models import merged

MODELS = {
    "1.0": ("cogvideox-5b-i2v", "cogvideox_5b_i2v_lora"),
    "1.5": ("cogvideox-1.5-5b-i2v", "cogvideox1.5_5b_i2v"),
}


def init(checkout: Checkout, data: Path, model: str, output: Path) -> str:
    options = ["--model", model, "--cogvideo", str(checkout.sat), "--gpu-memory", "200GB", "-o", str(output)]
    done = CliRunner().invoke(app, ["init", str(data), *options])
    return done.output + str(done.exception or "")


@pytest.mark.multiprocess
def test_it_trains_on_both_kinds_and_evaluates_what_it_holds_out(
    checkout: Checkout, media: Path, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "FEW", 10)
    monkeypatch.setattr(starter, "HELD_OUT", 4)
    name, file = MODELS[checkout.generation]
    said = init(checkout, media / "train", name, tmp_path / "run.yaml")
    assert f"cd {checkout.sat} && WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 python train_video.py" in said, said
    config = yaml.safe_load((tmp_path / "run.yaml").read_text())
    for key in ("save", "experiment_name"):
        del config["args"][key]
    small = {
        "args": {"train_iters": 3, "eval_interval": 3, "eval_iters": 4, "save_interval": 3, "log_interval": 1},
        "data": {
            "params": {"buckets": {"frames": [1, 9, tiny.FRAMES], "sizes": [list(tiny.SIZE)]}, "fps": 8}
        },
    }  # fmt: skip
    if checkout.generation == "1.5":
        small["args"]["only_log_video_latents"] = True  # the main branch cannot decode a still
    done = launch(file, (), merged([config, small]))
    assert done.kinds() == {"image", "video"}
    trained = {key for record in done.steps() for key in record["key"]}
    evaluated = {key for record in done.steps("valid") for key in record["key"]}
    assert evaluated and not trained & evaluated
    assert "every source" not in done.log  # all updates are mixed


def test_a_checkout_of_the_other_generation_is_refused(checkout: Checkout, media: Path, tmp_path: Path) -> None:
    (other,) = {"1.0", "1.5"} - {checkout.generation}
    said = init(checkout, media / "train", MODELS[other][0], tmp_path / "run.yaml")
    assert "--cogvideo: " in said and ("tag v1.0" if other == "1.0" else "main") in said
