from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from sat_ext.cli.main import app, main
from sat_ext.errors import ConfigError
from tests.sat_layout import sat_autoencoder, sat_transformer, write_sat
from tests.test_convert import sat_file
from tests.test_convert_lora import engine_run, lora_of, small_model


def test_convert_there_and_back(tmp_path: Path) -> None:
    write_sat(tmp_path / "sat" / "transformer", sat_transformer("1.5-5b"))
    (tmp_path / "sat" / "vae").mkdir()
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "sat" / "vae" / "3d-vae.pt")
    there = ["convert", str(tmp_path / "sat"), "-o", str(tmp_path / "out"), "--to", "diffusers"]
    done = CliRunner().invoke(app, [*there, "--size", "9x64x64", "--scale-factor", "0.7"])
    assert done.exit_code == 0
    assert f"{tmp_path / 'out' / 'transformer'}: 0.3 MB" in done.output
    assert f"{tmp_path / 'out' / 'vae'}: " in done.output
    back = ["convert", str(tmp_path / "out"), "-o", str(tmp_path / "back"), "--to", "sat", "--part", "vae"]
    assert CliRunner().invoke(app, back).exit_code == 0
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["vae"]
    found = torch.load(tmp_path / "back" / "vae" / "3d-vae.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], t) for name, t in sat_autoencoder().items())


def test_a_size_that_is_none_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "sat-ext",
        "convert",
        str(tmp_path),
        "-o",
        str(tmp_path / "out"),
        "--to",
        "sat",
        "--size",
        "480x720",
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    expected = "error: --size: '480x720' is not frames x height x width in pixels; write it like 49x480x720.\n"
    assert capsys.readouterr().err == expected


def test_convert_takes_several_yaml_files_after_one_base(tmp_path: Path) -> None:
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "3d-vae.pt")
    for name, scale in (("a", 0.7), ("b", 0.5)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"model": {"scale_factor": scale}}))
    command = ["convert", str(tmp_path / "3d-vae.pt"), "--to", "diffusers", "-o", str(tmp_path / "out"), "--base"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert done.exit_code == 0
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "a.yaml", "b.yaml", "sat"], "b.yaml: is taken for the source; name the source before --base."),
        (["sat", "other"], "other: only one source is taken at a time; YAML files go after --base."),
        (["sat", "--scale-factor", "0"], "--scale-factor: 0 is not a scale; use a number above 0."),
    ],
)
def test_arguments_that_do_not_fit_are_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = ["convert", "--to", "diffusers", "-o", str(tmp_path / "out"), *arguments]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, ConfigError) and str(done.exception) == message


def test_help_says_that_base_takes_several() -> None:
    for name in ("convert", "export"):
        assert "YAML..." in CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output


def test_merge_writes_whole_weights(tmp_path: Path) -> None:
    engine_run(tmp_path / "run", small_model(train=lora_of("all-linear", ["dora"])))
    command = ["convert", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--to", "sat"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ConfigError) and "--merge" in str(refused.exception)
    done = CliRunner().invoke(app, [*command, "--merge"])
    assert done.exit_code == 0 and "lora.yaml" not in done.output
    assert not any("matrix" in n or "original" in n for n in sat_file(tmp_path / "out" / "transformer"))
