"""How much samples move: the measure on known motion, in a run, and on its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sat_ext.cli.main import app
from sat_ext.config import load
from sat_ext.demo_data import Scene
from sat_ext.errors import ConfigError
from sat_ext.models.config import SamplingConfig
from sat_ext.motion import flow_score
from sat_ext.report.findings import find
from sat_ext.report.read import read_run
from tests.media import read_frames, real_clip
from tests.sat.ranks import Server, finish, folder_of
from tests.sat.runs import MODEL

SCENE = Scene(
    shape="square", colour="red", background="white", direction="right", size=(96, 96), diameter=0.5,
    start=(0.3, 0.5), velocity=(0.4, 0.0), frames=9,
)  # fmt: skip


def drawn(scene: Scene, fps: int = 8) -> np.ndarray:
    return np.stack([np.asarray(scene.draw(k / fps)) for k in range(scene.frames)])


def test_flow_is_that_of_a_picture_that_slides() -> None:
    wide = np.asarray(read_frames(str(real_clip("bikes.mp4")), [0.0])[0])
    height, step = 240, 3
    assert wide.shape[0] >= height and wide.shape[1] >= 280 + 9 * step, wide.shape
    slides = np.stack([wide[:height, step * k : step * k + 280] for k in range(9)])
    assert flow_score(slides, fps=8) == pytest.approx(step * 8 / height, rel=0.1)
    assert flow_score(slides, fps=16) == 2 * flow_score(slides, fps=8)
    assert flow_score(slides[:1], fps=8) == 0.0 and flow_score(np.stack([wide] * 4), fps=8) < 1e-3


def test_flow_rises_with_the_speed_of_a_shape_and_not_with_the_size_of_the_frame() -> None:
    flows = [flow_score(drawn(replace(SCENE, velocity=(v, 0.0))), fps=8) for v in (0.0, 0.1, 0.2, 0.4)]
    assert flows[0] == 0 and flows[1] < flows[2] < flows[3]
    assert flows[3] == pytest.approx(4 * flows[1], rel=0.5)
    large = flow_score(drawn(replace(SCENE, size=(192, 192))), fps=8)
    assert large == pytest.approx(flows[3], rel=0.25)


@pytest.mark.multiprocess
def test_a_run_says_that_nothing_is_held_out(
    server: Server, configure: Callable[..., list[str]], tmp_path: Path
) -> None:
    files = configure(tmp_path, train_iters=1, valid_data=None, eval_interval=None)
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"model": {**MODEL, "sampling": {"number": 2, "steps": 2, "motion": True}}}))
    run = server.start([*files, str(more)], world=1, folder=tmp_path / "log")
    finish(run, (0,))
    assert "motion is not measured, as nothing is held out" in run.log()


@pytest.mark.multiprocess
@pytest.mark.parametrize(("mode", "stage"), [("lora", 2), ("full", 3)])
def test_a_run_measures_its_samples_beside_its_bases(
    server: Server, configure: Callable[..., list[str]], tmp_path: Path, mode: str, stage: int
) -> None:
    files = configure(tmp_path, stage=stage, train_iters=4, eval_interval=2, eval_iters=4, save_interval=100)
    model: dict[str, Any] = {**MODEL, "sampling": {"number": 2, "steps": 2, "motion": True}}
    model["train"] = {"mode": mode, "rank": 4, "alpha": 4}
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({"model": model, "deepspeed": {"optimizer": {"params": {"lr": 0.05}}}}))
    run = server.start([*files, str(more)], world=2, folder=tmp_path / "log")
    finish(run)
    found = read_run(folder_of(tmp_path / "save"))
    for kind, of in found.motion.items():
        assert set(of) == {
            "model",
            *(["base"] if mode == "lora" else []),
            *(["held_out"] if kind == "video" else []),
        }
        assert all(list(series) == [0, 2, 4] for series in of.values())
        if mode == "lora":  # which is the base before it has learned anything
            assert of["model"][0] == of["base"][0] == of["base"][4] != of["model"][4]
    assert found.motion["video"]["held_out"][0] > 0.01
    assert list(found.samples["animated"]) == [0, 2, 4]
    assert "motion in frame heights a second, of the captions of stills: model " in run.log()
    page = tmp_path / "run.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path / "save"), "-o", str(page)]).exit_code == 0
    html = page.read_text()
    assert "Motion, captions of stills" in html and "Samples of animated at step 4" in html
    still = replace(found, motion={"image": {"model": {4: 0.05}, "base": {4: 0.1}}, "video": {}})
    (finding,) = [f for f in find(still) if "move less" in f.text]
    assert finding.text == (
        "Clips of the captions of stills move less than the base's: 0.05 against 0.1 frame heights a second "
        "(50\u00a0%)."
    )


def test_samples_that_cannot_be_measured_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="motion: true, but number: 0 makes no samples"):
        load(SamplingConfig, {"motion": True}, "model.sampling")
    monkeypatch.setattr("sat_ext.models.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs OpenCV; run pip install 'sat_ext\[motion\]'"):
        load(SamplingConfig, {"motion": True, "number": 1}, "model.sampling")


@pytest.mark.multiprocess
def test_samples_of_test_data_are_not_held_against_the_base_of_other_captions(
    server: Server, configure: Callable[..., list[str]], tmp_path: Path
) -> None:
    folders = {"valid": tmp_path / "valid", "test": tmp_path / "test"}
    for number, (name, folder) in enumerate(folders.items(), start=1):
        folder.mkdir()
        for still in range(2 * number - 1):
            Image.new("RGB", (32, 32), (80 * still, 40, 90)).save(folder / f"{still}.png")
            (folder / f"{still}.txt").write_text(f"{name} {still}")
    lists = {"valid_data": [str(folders["valid"])], "test_data": [str(folders["test"])]}
    files = configure(tmp_path, train_iters=4, eval_interval=3, eval_iters=4, save_interval=100, **lists)
    more = tmp_path / "more.yaml"
    model = {**MODEL, "sampling": {"number": 2, "steps": 2, "motion": True}, "train": {"mode": "lora", "rank": 4}}
    more.write_text(json.dumps({"model": model, "deepspeed": {"train_micro_batch_size_per_gpu": 2}}))
    run = server.start([*files, str(more)], world=1, folder=tmp_path / "log")
    finish(run, (0,))
    assert "data" in (folder_of(tmp_path / "save") / "heldout.jsonl").read_text().splitlines()[-1]
    assert list(read_run(folder_of(tmp_path / "save")).motion["image"]["model"]) == [0, 3]
