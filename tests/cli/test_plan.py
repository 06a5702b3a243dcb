from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sat_ext.cli.main import app
from sat_ext.cli.plan import size_of
from sat_ext.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
LORA = ("model/cogvideox-5b-i2v", "train/lora", "data/joint", "zero/zero2")


def plan(*options: str, files: tuple[str, ...] = LORA) -> Result:
    base = [str(CONFIGS / f"{name}.yaml") for name in files]
    return CliRunner().invoke(app, ["plan", "--base", *base, *options])


def test_the_table_shows_parts_buckets_and_what_to_use() -> None:
    shown = plan("--gpus", "8", "--gpu-memory", "80GB", "--host-memory", "1TB")
    assert shown.exit_code == 0, shown.output
    for words in (
        "activations",
        "first stage",
        "given",
        "zero3",
        "49x480x720",
        "Use configs/zero/",
        "sat-ext cache",
    ):
        assert words in shown.output


def test_where_nothing_fits_the_levers_are_named_and_the_status_is_1() -> None:
    shown = plan("--gpu-memory", "6GB", "--host-memory", "32GB")
    assert shown.exit_code == 1
    assert "Nothing fits 6.0 GB a GPU and 32.0 GB a host." in shown.output
    assert "model.train.quantization: nf4" in shown.output


def test_json_is_one_object() -> None:
    shown = plan("--json", "--gpus", "8", "--gpus-per-node", "4", "--gpu-memory", "80GB", "--host-memory", "1TB")
    found = json.loads(shown.output)
    assert [c["name"] for c in found["configs"]][:2] == ["given", "zero0"]
    assert found["recommended"] and shown.exit_code == 0
    assert found["gpu_memory"] == 80 * 10**9
    assert found["cache"]["gpu"] == max(found["cache"]["text"], found["cache"]["first_stage"])


def test_a_tiny_model_fits_anything() -> None:
    shown = plan(files=("model/tiny", "train/full", "data/demo", "zero/zero1"))
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24gb", 24e9), ("24G", 24e9), ("24 GiB", 24 * 2**30), ("80000MB", 80e9), ("1000", 1000)],
)
def test_sizes(text: str, size: float) -> None:
    assert size_of(text, "--gpu-memory") == int(size)


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpu-memory: 'much' is not a size; write 24GB or 24GiB"):
        size_of("much", "--gpu-memory")
