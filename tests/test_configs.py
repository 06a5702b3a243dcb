"""Every YAML that ships: it merges, its keys are known, and what it says is what the README says."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from sat_ext.config import load
from sat_ext.data.config import DataConfig
from sat_ext.errors import ConfigError
from sat_ext.models.config import ModelConfig, check_bucket, load_model_config
from sat_ext.sat.arguments import parse_args, read_yaml

CONFIGS = Path(__file__).parent.parent / "configs"


def names(folder: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("model", names("model"))
def test_models_are_known_to_the_last_key(model: str) -> None:
    section = read_yaml([str(CONFIGS / "model" / f"{model}.yaml")])["model"]
    config = load(ModelConfig, section, "model")
    assert (config.conditioning == "i2v") == ("i2v" in model or model == "tiny")


@pytest.mark.parametrize(("train", "data", "zero"), product(names("train"), names("data"), names("zero")))
def test_any_training_data_and_zero_files_merge(
    train: str, data: str, zero: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    files = ["model/tiny.yaml", f"data/{data}.yaml", f"zero/{zero}.yaml", f"train/{train}.yaml"]
    args = parse_args(["--base", *(str(CONFIGS / f) for f in files), "--train-iters", "7"])
    assert args.train_iters == 7  # a flag beats the YAML
    assert args.deepspeed_config["zero_optimization"]["stage"] == int(zero.removeprefix("zero")[0])
    assert args.lr == args.deepspeed_config["optimizer"]["params"]["lr"]
    buckets = load(DataConfig, args.data_config["params"], "data.params").make_buckets()
    if data == "demo":
        for bucket in buckets:
            check_bucket(load_model_config(args.model_config), bucket)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("args: {a: [", "not valid YAML"),
        ("- a", "expected sections"),
        ("training: {}", "unknown key 'training'"),
        ("args: {}", "no 'model' section in"),
    ],
)
def test_a_broken_yaml_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_args(["--base", str(file)])


def test_a_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file nowhere.yaml"):
        parse_args(["--base", "nowhere.yaml"])
