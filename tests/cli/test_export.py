from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from sat_ext.cli.main import app, main
from tests.test_convert_lora import LORA_FILE, sat_lora, write_run, write_sat


def test_export_says_how_to_load_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run", sat_lora())
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert f"{tmp_path / 'out' / LORA_FILE}: 0.0 MB" in done.output
    assert f"pipeline.load_lora_weights('{tmp_path / 'out'}')  # rank 4, alpha 6.0" in done.output


def test_export_takes_the_averages_of_a_run_of_cogvideos_and_of_nothing_else(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, sat_lora())
    torch.save({"module": {name: 2 * value for name, value in sat_lora().items()}}, run / "1" / "ema.pt")
    found = []
    for options in (["--ema"], []):
        done = CliRunner().invoke(app, ["export", str(run), "-o", str(out / str(options)), *options])
        assert done.exit_code == 0
        found.append(load_file(out / str(options) / LORA_FILE))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, 2 * found[1][name]) for name, value in found[0].items())
    done = CliRunner().invoke(app, ["export", str(out / "[]" / LORA_FILE), "-o", str(tmp_path / "no"), "--ema"])
    assert str(done.exception).endswith(
        f"{LORA_FILE} is no checkpoint, which alone may hold averaged weights; leave it out."
    )


def test_export_takes_alpha(tmp_path: Path) -> None:
    write_sat(tmp_path / "run", sat_lora())
    command = ["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--alpha", "8"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert "rank 4, alpha 8.0" in done.output


@pytest.mark.parametrize("alpha", ["0", "-1", "nan"])
def test_an_alpha_that_is_not_over_0_is_one_sentence(
    alpha: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sat(tmp_path / "run", sat_lora())
    command = ["sat-ext", "export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--alpha", alpha]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: --alpha: {alpha} is not a scale; use a number above 0.\n"


def test_export_takes_several_yaml_files_after_one_base(tmp_path: Path) -> None:
    write_sat(tmp_path / "run", sat_lora())
    for name, alpha in (("a", 3), ("b", 5)):
        config = {"params": {"modules": {"lora_config": {"params": {"lora_alpha": alpha}}}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"network_config": config}}))
    command = ["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--base"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert done.exit_code == 0
    assert "rank 4, alpha 5.0" in done.output
