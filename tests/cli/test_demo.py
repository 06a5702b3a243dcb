from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sat_ext.cli.main import app, main


def test_demo_writes_a_mixed_data_set(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["demo", str(tmp_path / "d"), "--clips", "3", "--stills", "4", "--held-out", "1"]
    )
    assert done.exit_code == 0
    assert "3 clips and 4 stills in train/, 1 of each in heldout/" in done.output
    assert len(list((tmp_path / "d" / "train" / "videos").iterdir())) == 3


def test_a_mistake_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.setattr("sys.argv", ["sat-ext", "demo", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path}")
    assert message.count("\n") == 1
