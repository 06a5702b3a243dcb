"""docs/styles.md, step by step, with the tiny model and its YAML as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from sat_ext.cli.main import app
from sat_ext.report.read import read_run
from tests.sat.ranks import Server, finish

GUIDE = Path(__file__).parents[1] / "docs" / "styles.md"


def run(*options: object) -> str:
    done = CliRunner().invoke(app, [*map(str, options)])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


@pytest.mark.multiprocess
@pytest.mark.usefixtures("one_rank")
def test_pictures_to_moving_samples(server: Server, tmp_path: Path) -> None:
    pictures, prior, style, written = (
        tmp_path / name for name in ("pictures", "prior", "style.yaml", "my_run.yaml")
    )
    pictures.mkdir()
    for number in range(30):
        Image.new("RGB", (80, 80), (8 * number, 40, 90)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"picture {number}")
    run("init", pictures, "--model", "tiny", "-o", written)
    (text,) = re.findall(r"```yaml\n# style.yaml\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    text = text.replace("49", "9").replace("motion: true", "motion: true, steps: 2")
    style.write_text(text.replace("pictures/", str(pictures)).replace("prior/", str(prior)))
    files = ["--base", str(written), str(style)]
    said = run("prior", *files, "--prompts", pictures, "-o", prior)
    assert f"{prior}: 30 clips, which the YAML names as a source." in said
    assert len(list(prior.glob("*.mp4"))) == 30
    finish(server.start([*files, "--train-iters", "3"], world=1, folder=tmp_path / "log"), (0,))
    found = read_run(tmp_path / "runs" / "my_run")
    assert {kind for kind, of in found.motion.items() if of} == {"image", "video"}
    run("report", tmp_path / "runs" / "my_run", "-o", tmp_path / "run.html")
    assert "Motion, captions of stills" in (tmp_path / "run.html").read_text()
