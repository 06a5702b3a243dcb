"""Cuts in real clips, as rows that training reads."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sat_ext.cli.main import app
from sat_ext.data.sources import read_source

pytest.importorskip("scenedetect")


def scene(number: int, frames: int) -> list[np.ndarray]:
    """A gradient that moves, unlike those of other numbers."""
    rng = np.random.default_rng(number)
    colour, across = rng.integers(40, 255, 3), np.linspace(0, 1, 96)
    return [
        np.broadcast_to((np.roll(across, 2 * i)[None, :, None] * colour), (64, 96, 3)).astype(np.uint8).copy()
        for i in range(frames)
    ]


def write_frames(path: Path, frames: list[np.ndarray], fps: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def takes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip with cuts after 2 and after 2.4 s, one without, one that is damaged, and a still."""
    folder = tmp_path_factory.mktemp("takes")
    write_frames(folder / "cut.mp4", [*scene(1, 50), *scene(5, 10), *scene(9, 75)], fps=25)
    write_frames(folder / "whole.mp4", scene(2, 40), fps=25)
    (folder / "broken.mp4").write_bytes((folder / "cut.mp4").read_bytes()[:2000])
    Image.new("RGB", (64, 64)).save(folder / "still.png")
    for file in list(folder.iterdir()):
        (folder / f"{file.stem}.txt").write_text(f"about {file.stem}")
    return folder


def scenes(*options: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["scenes", *map(str, options)])
    return done.exit_code, done.output + str(done.exception or "")


def test_no_row_crosses_a_cut(takes: Path, tmp_path: Path) -> None:
    table = takes / "clips.jsonl"
    status, said = scenes(takes, "-o", table)
    assert status == 0, said
    assert "3 clips of 3 files, 1 of which have cuts" in said and "1 of less than 1 s left out; 1 stills" in said
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    parts = sorted((r["path"], r.get("start"), r.get("end")) for r in rows if r["path"] == "cut.mp4")
    assert [(path, start) for path, start, _ in parts] == [
        ("cut.mp4", 0.0),
        ("cut.mp4", pytest.approx(2.4, abs=0.05)),
    ]
    assert parts[0][2] == pytest.approx(2.0, abs=0.05) and parts[1][2] == pytest.approx(5.4, abs=0.05)
    items = read_source(str(table))
    assert {(i.key.partition("#")[0], i.captions) for i in items} == {
        ("cut.mp4", ("about cut",)), ("whole.mp4", ("about whole",)), ("still.png", ("about still",)),
    }  # fmt: skip
    table.unlink()


def test_outside_the_media_the_table_says_what_it_needs(takes: Path, tmp_path: Path) -> None:
    status, said = scenes(takes, "-o", tmp_path / "clips.jsonl", "--shortest", "0.1")
    assert status == 0 and f"add 'allowed_roots: [{takes}]'" in said.replace("\n", ""), said
    assert len(read_source(str(tmp_path / "clips.jsonl"), allowed_roots=[str(takes)])) == 5


def test_what_cannot_be_is_one_sentence(takes: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.jsonl"
    taken.write_text("")
    for options, sentence in (
        ((takes, "-o", taken), "taken.jsonl exists; remove it, or name another"),
        ((takes, "-o", tmp_path / "clips.csv"), "write one that ends in .jsonl"),
        ((tmp_path / "none", "-o", tmp_path / "a.jsonl"), "no such file or folder"),
        ((takes, "-o", tmp_path / "a.jsonl", "--shortest", "100"), "no clip of 100 s or more"),
    ):
        status, said = scenes(*options)
        assert status == 1 and sentence in said, said
