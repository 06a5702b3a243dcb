"""The page about a run: every number on it is one of the files'."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboardX import SummaryWriter
from typer.testing import CliRunner

from sat_ext.cli.main import app
from sat_ext.report.charts import line_chart
from sat_ext.report.read import read_run

SECONDS = {"data": 3.0, "encode": 1.0, "forward": 4.0, "backward": 8.0, "optimizer": 4.0}


def write_run(root: Path, *, steps: int = 200, of: int = 400) -> Path:
    """The files of a run that clips its gradients, waits for data, and forgets its clips."""
    folder = root / "run-1"
    (folder / "samples").mkdir(parents=True)
    with SummaryWriter(str(root / "runs/run-1")) as events:
        for step in range(20, steps + 1, 20):
            values = {"loss_image": 1 / step, "loss_video": 2 / step, "grad_norm": 3.0, "clipped": 0.9, "lr": 1e-4}
            for name, value in values.items():
                events.add_scalar(f"Train/{name}", value, step)
    rows: list[dict[str, Any]] = [
        {"start": start, "time": 1.8e9 + start, "world": 2, "train_iters": of, "events": "../runs/run-1"}
        for start in (0, 100)
    ]
    rows += [
        {"iteration": step, "time": 1.8e9 + step, "samples": 80, "tokens": 8000, "steps": 20, "seconds": SECONDS}
        for step in range(20, steps + 1, 20)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 22')
    held_out = [(0, 1.0, 1.0), (100, 0.5, 0.4), (150, 0.4, 0.5), (200, 0.3, 0.6)]
    lines = [{"iteration": i, "loss_image": a, "loss_video": b} for i, a, b in held_out]
    lines.append({"iteration": 200, "loss_image": 9.0, "data": "test_data"})
    (folder / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skipped = {"iteration": 40, "rank": 0, "path": "<b>.mp4", "reason": "truncated: it ends at byte 7"}
    (folder / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    data = {"records": [], "bad": [1, [["c.mp4", "the file is empty"]]], "dropped": [0, []], "unread": {}}
    (folder / "data.json").write_text(json.dumps(data))
    bucket = {"bucket": "9x64x64", "steps": 12, "seconds": 0.25, "predicted": 2 * 10**9, "allocated": 25 * 10**8}
    (folder / "memory.json").write_text(json.dumps({"buckets": [bucket]}))
    for step in (0, 100, 200):
        Image.new("RGB", (60, 40), (step, 0, 0)).save(folder / f"samples/{step:08d}_video.png")
    return folder


def report(*options: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["report", *map(str, options)])
    return done.exit_code, done.output + str(done.exception or "")


def test_its_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    folder, page = write_run(tmp_path), tmp_path / "run.html"
    status, said = report(tmp_path, "-o", page)  # the newest of several
    assert status == 0 and "run-1, step 200" in said, said
    html = page.read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.partition("</style>")[2]))
    for words in (
        "200 of 400 steps.",
        "held-out loss of stills 0.3 held-out loss of clips 0.6",
        "seconds a step 1 samples a second 4 tokens a second 400 samples seen 800",
        "of training, without evaluations 0:03:20",
        "The held-out loss of clips rises: 0.4 at step 100, 0.6 at step 200, while that of stills does not.",
        "15 % of the time goes into waiting for data",
        "90 % of the updates were clipped (the norm before clipping is 3)",
        "1 files could not be read in training, and 1 before it",
        "More memory was taken than predicted, with 9x64x64",
        "backward pass 40 %",
        "9x64x64 12 0.25 2.0 2.5",
        "2027-01-15 08:00 UTC: started on 2 ranks",
        "resumed at step 100 on 2 ranks",
        "truncated &lt;b&gt;.mp4: truncated: it ends at byte 7".replace("truncated &lt;b", "&lt;b"),
    ):
        assert words.replace("\u00a0", " ") in text.replace("\u00a0", " "), (words, text)
    assert html.count('<img class="sheet') == 3 and 'id="clips-200" checked' in html
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html
    run = read_run(folder)
    assert run.scalars["loss_image"][100] == pytest.approx(0.01)
    assert (run.iteration, run.train_iters) == (200, 400)


def test_a_run_that_has_just_begun_or_is_cogvideos_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "training_config.yaml").write_text("args: {}")
    status, said = report(folder, "-o", tmp_path / "run.html")
    assert status == 0, said
    assert "Nothing is logged yet" in (tmp_path / "run.html").read_text()
    with SummaryWriter(str(tmp_path / "elsewhere")) as events:
        for step in (1, 2, 3):
            events.add_scalar("Train/train_loss", 0.5, step)
            events.add_scalar("Train/valid_loss_video", 0.7, step)
    time.sleep(0.01)
    status, said = report(folder, "--events", tmp_path / "elsewhere", "-o", tmp_path / "run.html")
    html = (tmp_path / "run.html").read_text()
    assert status == 0 and "clips, held out <b>0.7</b>" in html


def test_what_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs")
    for options, sentence in (
        ((tmp_path / "none",), "there is no such folder"),
        ((run / "samples",), "no run in it"),
        ((run, "--events", tmp_path / "none"), "--events: there is no folder"),
        ((run, "-o", tmp_path), "is not a file; name one"),
    ):
        status, said = report(*options)
        assert status == 1 and sentence in said, said


def test_lines_lie_in_the_chart() -> None:
    values = {step: 1.0 / (1 + step) for step in range(5000)}
    chart = line_chart("Loss", "", {"a": (0, values), "none": (1, {}), "odd": (1, {3: float("nan")})}, log=True)
    assert chart is not None and [line.name for line in chart.lines] == ["a"]
    (line,) = chart.lines
    assert len(line.points) == 300 and line.last == values[4999]
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in line.points)
    assert line_chart("Loss", "", {"none": (0, {})}) is None
