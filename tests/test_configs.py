"""Every YAML that ships: it merges, its keys are known, and what it says is what the README says."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from sat_ext.config import load
from sat_ext.data.params import DataConfig
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.models.config import ModelConfig, check_bucket
from sat_ext.models.folder import load_model_config
from sat_ext.recipe import doubts_of
from sat_ext.sat import hooks
from sat_ext.sat.arguments import parse_args, read_yaml
from sat_ext.sat.settings import Settings, settings_of

CONFIGS = Path(__file__).parent.parent.resolve() / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading arguments makes the folder of args.save."""
    monkeypatch.chdir(tmp_path)


def names(folder: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("model", names("model"))
def test_models_are_known_to_the_last_key(model: str) -> None:
    section = read_yaml([str(CONFIGS / "model" / f"{model}.yaml")])["model"]
    config = load(ModelConfig, section, "model")
    assert (config.conditioning == "i2v") == ("i2v" in model or model == "tiny")


@pytest.mark.parametrize(
    ("train", "data", "zero"), product([t for t in names("train") if t != "fp16"], names("data"), names("zero"))
)
def test_any_training_data_and_zero_files_merge(
    train: str, data: str, zero: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    files = ["model/tiny.yaml", f"data/{data}.yaml", f"zero/{zero}.yaml", f"train/{train}.yaml"]
    args = parse_args(["--base", *(str(CONFIGS / f) for f in files), "--train-iters", "7"])
    assert args.train_iters == 7  # a flag beats the YAML
    assert args.deepspeed_config["zero_optimization"]["stage"] == int(zero.removeprefix("zero")[0])
    assert args.resolved_config["args"]["train_iters"] == 7
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


@pytest.mark.parametrize("zero", [z for z in names("zero") if z != "zero0"])
def test_fp16_lies_over_every_zero_file_that_scales_the_loss(zero: str) -> None:
    files = ["model/tiny.yaml", "data/joint.yaml", f"zero/{zero}.yaml", "train/full.yaml", "train/fp16.yaml"]
    merged = read_yaml([str(CONFIGS / f) for f in files])["deepspeed"]
    assert merged["fp16"]["enabled"] and not merged["bf16"]["enabled"]
    DeepSpeedConfig({"train_batch_size": 1, **{k: merged[k] for k in ("fp16", "bf16")}})
    model = read_yaml([str(CONFIGS / "model" / "cogvideox-2b.yaml")])["model"]
    lora = {"optimizer": {"params": {"lr": 1e-4}}}
    assert doubts_of(engine_of(model), {**merged, **lora}, {}, 1) == []
    assert "published in fp16" in doubts_of(engine_of(model), {**lora, "bf16": {"enabled": True}}, {}, 1)[0]


TINY = [str(CONFIGS / f) for f in ("model/tiny.yaml", "data/joint.yaml", "zero/zero1.yaml", "train/full.yaml")]


def test_the_order_of_zero_and_train_files_does_not_change_the_learning_rate() -> None:
    swapped = [*TINY[:2], TINY[3], TINY[2]]
    assert parse_args(["--base", *TINY]).lr == parse_args(["--base", *swapped]).lr == 1e-5


def test_flags_beat_the_deepspeed_section_too() -> None:
    args = parse_args(["--base", *TINY, "--lr", "0.5", "--batch-size=7", "--gradient-accumulation-steps", "3"])
    assert args.deepspeed_config["optimizer"]["params"]["lr"] == args.lr == 0.5
    assert args.deepspeed_config["train_micro_batch_size_per_gpu"] == args.batch_size == 7
    assert args.deepspeed_config["gradient_accumulation_steps"] == 3


def test_a_misspelt_deepspeed_key_and_a_missing_target_are_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("deepspeed: {zero_optimisation: {stage: 3}}")
    with pytest.raises(ConfigError, match="unknown key 'zero_optimisation'; did you mean 'zero_optimization'"):
        parse_args(["--base", *TINY, str(file)])
    file.write_text("data: {target: null}")
    with pytest.raises(ConfigError, match="data.target: missing; add 'target: sat_ext.JointImageVideoDataset'"):
        parse_args(["--base", *TINY, str(file)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("args: {train_data: my_data}", "args.train_data: expected a list, got 'my_data'"),
        ("args: {train_iters: many}", "args.train_iters: expected int, got 'many'"),
        ("args: {lr_decay_style: cosin}", "args.lr_decay_style: 'cosin' is not one of constant, linear"),
        ("args: {iterable_dataset: true}", "write 'iterable_dataset: custom'"),
        ("args: {seed: 0}", "args.seed: 0; use 1 or more"),
        ("args: {strict_eval: true}", "args.strict_eval: a stream has no last batch"),
        ("args: {valid_data: null}", "args.eval_interval: there is nothing to evaluate on"),
        ("args: {train_data: [a, b], train_data_weights: [1]}", "1 weights for 2 entries"),
        ("args: {save: /proc/nowhere}", "args.save: /proc/nowhere cannot be made"),
        ("deepspeed: {train_micro_batch_size_per_gpu: 0}", "args.batch_size: 0; use 1 or more"),
    ],
)
def test_values_that_sat_would_stumble_over_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_args(["--base", *TINY, str(file)])


def test_help_lists_sats_flags_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_args(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--base", "--train-iters", "--checkpoint {weights,full}", "--keep-last", "--without-fixes"):
        assert flag in shown


def test_the_settings_beside_sats_are_read_from_yaml_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("args: {checkpoint: full, keep_last: 2, without_fixes: [launcher]}")
    args = parse_args(["--base", *TINY, str(file), "--keep-last", "5"])
    assert settings_of(args) == Settings(checkpoint="full", keep_last=5, without_fixes=("launcher",))
    assert args.resolved_config["args"]["keep_last"] == 5
    assert settings_of(parse_args(["--base", *TINY])) == Settings(checkpoint="full", keep_last=2)
    assert settings_of(parse_args(["--base", *TINY[:3], "--train-iters", "1"])) == Settings()
    file.write_text("args: {checkpoint: ful}")
    with pytest.raises(ConfigError, match="args.checkpoint: 'ful' is not one of weights, full"):
        parse_args(["--base", *TINY, str(file)])
    file.write_text("args: {without_fixes: [lr]}")
    with pytest.raises(ConfigError, match="args.without_fixes: unknown key 'lr'"):
        hooks.install(parse_args(["--base", *TINY, str(file)]))
