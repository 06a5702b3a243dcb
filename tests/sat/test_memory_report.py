from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_ext.errors import ConfigError
from sat_ext.sat import memory_report
from sat_ext.sat.memory_report import MemoryReport, bucket_of, measuring
from sat_ext.sat.memory_report import report_of as begin
from sat_ext.types import Bucket
from tests.sat.runs import MODEL


@pytest.fixture(autouse=True)
def nothing_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_report.atexit, "register", lambda function: None)


def args_of(**changes: Any) -> Namespace:
    values = {
        "num_workers": 0, "batch_size": 1, "gradient_accumulation_steps": 1,
        "model_config": MODEL, "deepspeed_config": {"train_micro_batch_size_per_gpu": 2},
        "data_config": {
            "target": "sat_ext.JointImageVideoDataset",
            "params": {"video_size": [32, 32], "max_num_frames": 5},
        },
    }  # fmt: skip
    return Namespace(**{**values, **changes})


def batch(frames: int) -> dict[str, Any]:
    return {"mp4": torch.zeros(1, frames, 3, 32, 32, dtype=torch.uint8)}


def test_the_plan_is_shown_once_and_by_the_first_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = args_of()
    report = begin(args)
    shown = capsys.readouterr().out
    assert "activations" in shown and "5x32x32" in shown
    assert begin(args) is report
    monkeypatch.setattr(memory_report, "rank_and_world", lambda: (1, 2))
    begin(args_of())
    assert capsys.readouterr().out == ""


def test_a_run_that_cannot_be_predicted_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    assert begin(args_of(data_config={"target": "mine.Data", "params": {"folder": "x"}})).plan is None
    assert "memory: cannot be predicted for this run (data.target is not a class of sat_ext's)" in caplog.text
    assert begin(args_of(model_config={})).plan is None
    assert "memory: cannot be predicted for this run (ConfigError: --base: no 'model' section" in caplog.text


def test_a_mistake_in_the_data_is_an_error_and_no_warning() -> None:
    data = {"target": "sat_ext.JointImageVideoDataset", "params": {"folder": "x"}}
    with pytest.raises(ConfigError, match="data.params: unknown key 'folder'"):
        begin(args_of(data_config=data))


class Gpu:
    """A GPU of 1 MB, whose peaks are given."""

    def __init__(self, peaks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.peaks, self.resets = peaks, 0
        for name, value in (
            ("is_available", lambda: True),
            ("max_memory_allocated", lambda: self.peaks.pop(0)),
            ("max_memory_reserved", lambda: 6_000_000_000),
            ("get_device_name", lambda: "a stand-in"),
            ("reset_peak_memory_stats", self._reset),
            ("current_device", lambda: 0),
            ("device_count", lambda: 1),
            ("get_device_properties", lambda _: Namespace(total_memory=10**6)),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def _reset(self) -> None:
        self.resets += 1


def test_a_run_that_does_not_fit_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gpu([], monkeypatch)
    begin(args_of())
    assert "GB of a GPU that has 0.0; `sat-ext plan` with the same YAML says what to change" in caplog.text


def test_peaks_are_measured_by_bucket(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = Gpu([9_000_000_000, 5_000_000_000, 4_000_000_000, 3_000_000_000], monkeypatch)
    args, data = args_of(save=str(tmp_path)), iter([batch(5), batch(1), batch(5), batch(5)])
    step = measuring(lambda data, model, args, timers: next(data)["mp4"].shape[1])
    assert [step(data, None, args, None) for _ in range(4)] == [5, 1, 5, 5]
    report = begin(args)
    report.close()
    peaks = {bucket: of.allocated for bucket, of in report.measured.items()}
    assert peaks == {"5x32x32": 4_000_000_000, "1x32x32": 0}  # the first step of a bucket looks for kernels
    assert gpu.resets == 5
    capsys.readouterr()
    report.show()
    shown = capsys.readouterr().out
    assert "measured GB" in shown and "4.0" in shown and "not measured" in shown and "9.0" not in shown
    first, second = json.loads((tmp_path / "memory.json").read_text())["buckets"]
    assert (first["bucket"], first["samples"], first["steps"]) == ("5x32x32", 1, 3)
    assert (first["allocated"], first["reserved"]) == (4_000_000_000, 6_000_000_000)
    assert (first["first"], second["first"], second["allocated"]) == (9_000_000_000, 5_000_000_000, None)
    assert first["seconds"] >= 0 and second["seconds"] is None and first["predicted"] > 0


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    report = MemoryReport(None)
    report.show()
    assert capsys.readouterr().out == ""  # no step was made
    seen = report.seeing(iter([batch(5)]))
    assert seen is not None and next(seen)
    report.close()
    report.show()
    assert capsys.readouterr().out == "memory: the peak was not measured, there is no GPU\n"
    assert report.seeing(None) is None  # a rank that is given its batches by another


def test_a_cached_batch_is_of_the_bucket_that_its_latents_stand_for() -> None:
    cached = {"mp4": torch.zeros(2, 13, 16, 60, 90)}
    assert bucket_of(cached) == Bucket(frames=49, height=480, width=720)


def test_the_entry_script_plans_before_it_loads() -> None:
    lines = (Path(memory_report.__file__).parents[2] / "train_video.py").read_text()
    assert lines.index("hooks.install(args)") < lines.index("training_main(\n")
