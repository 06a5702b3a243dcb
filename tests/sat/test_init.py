"""What `sat-ext init` writes trains as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sat_ext.cli.main import app
from tests.sat.ranks import Server, finish


def sources(demo: Path, folder: Path, which: str) -> list[Path]:
    """The demo's data, a kind of it, one file of it, or 10,000 links to one."""
    if which in ("stills", "videos"):
        return [demo / "train" / which]
    if which == "mixed":
        return [demo / "train"]
    folder.mkdir()
    for i in range(1 if which == "one" else 10_000):
        if i == 0:
            Image.new("RGB", (80, 60), (200, 40, 90)).save(folder / "0.png")
            (folder / "0.txt").write_text("a pink picture")
        else:
            (folder / f"{i}.png").hardlink_to(folder / "0.png")
            (folder / f"{i}.txt").hardlink_to(folder / "0.txt")
    return [folder]


@pytest.mark.multiprocess
@pytest.mark.parametrize("which", ["mixed", "stills", "videos", "one", "many"])
def test_it_trains(server: Server, demo: Path, tmp_path: Path, which: str) -> None:
    output = tmp_path / "run.yaml"
    paths = map(str, sources(demo, tmp_path / "media", which))
    done = CliRunner().invoke(app, ["init", *paths, "--model", "tiny", "-o", str(output)])
    assert done.exit_code == 0, done.output
    run = server.start(["--base", str(output), "--train-iters", "2"], world=1, folder=tmp_path / "ranks")
    finish(run, (0,))
    assert [record["iteration"] for record in run.records()] == [0, 1]
    assert ("an evaluation is of" in run.log()) == (which in ("mixed", "many"))
