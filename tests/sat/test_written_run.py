"""Checkpoints, and the index of a data set, that an earlier version wrote are read by this one.

`tests/written/run` was written by sat_ext 0.1.0: `weights` by 4 steps with `checkpoint: weights`, `lora` by a LoRA
that began from it, under ZeRO-2 on 2 ranks with `checkpoint: full`, both on `data` with its index. Kept are the
last iteration of `weights`, and iteration 2 of `lora`, whose `base.path` in sat_ext.json was made relative.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from sat_ext.checkpoint.reading import read_weights
from sat_ext.cli.main import app
from sat_ext.config import load
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from tests.sat.ranks import Server, finish

FIXTURES = Path(__file__).parents[1] / "written" / "run"


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy, with the modification times of then: the index knows files by them, and Git does not."""
    folder = tmp_path / "before"
    shutil.copytree(FIXTURES, folder)
    for number, file in enumerate(sorted(p for p in (folder / "data").iterdir() if p.is_file())):
        os.utime(file, (1_700_000_000 + number,) * 2)
    manifest = folder / "lora" / "2" / "sat_ext.json"
    manifest.write_text(manifest.read_text().replace('"path": "weights"', f'"path": "{folder / "weights"}"'))
    return folder


def resume(server: Server, before: Path, world: int) -> Any:
    """Go on with the LoRA's run to its end."""
    config = yaml.safe_load((before / "lora" / "training_config.yaml").read_text())
    config["args"] |= {
        "load": str(before / "lora"), "mode": "pretrain", "save": str(before),
        "train_data": [str(before / "data")],
    }  # fmt: skip
    (before / "resume.yaml").write_text(yaml.safe_dump(config))
    folder = before / "records"
    run = server.start(["--base", str(before / "resume.yaml")], world=world, folder=folder, gradients=True)
    finish(run, (0,) * world)
    return run


@pytest.mark.multiprocess
def test_a_full_checkpoint_is_resumed(server: Server, before: Path) -> None:
    saved, iteration = read_weights(before / "lora")
    cells = json.loads((before / "lora" / str(iteration) / "sat_ext.json").read_text())["cells"]
    run = resume(server, before, 2)
    assert [r["iteration"] for r in run.records()] == [2, 3]
    found = torch.load(before / "records" / "rank0.pt", weights_only=False)["weights"]
    adapters = {name: weight for name, weight in saved.items() if "lora_" in name}
    assert adapters
    for name, weight in adapters.items():
        torch.testing.assert_close(found[name], weight.float(), rtol=0, atol=1e-6)
    said = [line for line in run.log().splitlines() if "resume:" in line]
    assert len(said) == 1 and "the steps come in a new order, each sample of the epoch still once" in said[0]
    after = json.loads((before / "lora" / "4" / "sat_ext.json").read_text())["cells"]
    keys = [key for rank in range(2) for r in run.records(rank) for key in r["keys"]]
    assert sum(c["used"] for c in after) == sum(c["used"] for c in cells) + len(keys)


@pytest.mark.multiprocess
def test_a_full_checkpoint_is_resumed_by_one_rank(server: Server, before: Path) -> None:
    run = resume(server, before, 1)
    assert [r["iteration"] for r in run.records()] == [2, 3]
    assert all(float.fromhex(r["loss"]) < 3 for r in run.records())
    manifest = json.loads((before / "lora" / "4" / "sat_ext.json").read_text())
    assert (manifest["iteration"], manifest["world"], manifest["global_steps"]) == (4, 1, 4)


@pytest.mark.parametrize(("run", "iteration"), [("weights", 4), ("lora", 2)])
def test_samples_are_generated_from_it(
    run: str, iteration: int, before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(before)
    done = CliRunner().invoke(app, ["sample", run, "--prompt", "a still", "--frames", "1", "--sheet", "s.png"])
    assert done.exit_code == 0, done.output
    assert f"checkpoint of step {iteration} in {run}" in done.output


def test_its_lora_is_exported(before: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(before / "lora"), "-o", str(before / "out")])
    assert done.exit_code == 0, done.output
    assert "rank 2, alpha 4" in done.output
    exported = load_file(before / "out" / "pytorch_lora_weights.safetensors")
    saved = torch.load(before / "lora" / "2" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    matrices = {n: t for n, t in saved.items() if ".lora_" in n}
    assert len(exported) == len(matrices) == 8
    for name, value in matrices.items():
        short = name.removeprefix("network.").replace(".default.", ".")
        assert torch.equal(exported[f"transformer.{short}"], value)


def test_its_weights_are_converted_with_those_of_its_base(before: Path) -> None:
    for run in ("weights", "lora"):
        done = CliRunner().invoke(
            app, ["convert", str(before / run), "--to", "diffusers", "-o", str(before / f"{run}-out")]
        )
        assert done.exit_code == 0, done.output
    one, other = (
        load_file(before / f"{run}-out" / "transformer" / "diffusion_pytorch_model.safetensors")
        for run in ("weights", "lora")
    )
    assert one.keys() == other.keys()


def test_an_index_is_used_without_probing(before: Path) -> None:
    def probing(outcomes: Iterable[Any], total: int) -> Iterable[Any]:
        assert total == 0
        return outcomes

    config = load(DataConfig, {"video_size": [32, 32], "max_num_frames": 5}, "data.params")
    index = build_index([SourceConfig(path=str(before / "data"))], config, probing=probing)
    expected = {p.name for p in (before / "data").iterdir() if p.suffix in (".jpg", ".mp4")}
    assert set(index.table["key"].to_pylist()) == expected
    assert not index.bad
