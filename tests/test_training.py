"""The entry script in real processes: every launcher, every ZeRO stage, and what a user gets to see."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from sat_ext.checkpoint.layout import find_run
from sat_ext.cli.main import app
from sat_ext.demo_data import write_demo
from sat_ext.errors import ConfigError
from sat_ext.models.generate import load_engine
from sat_ext.report.read import read_run
from tests.sat.ranks import Server

ROOT = Path(__file__).parent.parent
MODEL = {
    "conditioning": "i2v",
    "first_stage": {"kind": "cosine"},
    "text": {"kind": "byt5", "max_length": 48},
    "sampling": {"number": 2, "steps": 2},
    "transformer": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "out_channels": 16,
        "time_embed_dim": 16, "text_embed_dim": 16, "max_text_seq_length": 48,
        "use_rotary_positional_embeddings": True,
    },
}  # fmt: skip
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29610"],
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29620"],
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "data"
    write_demo(folder, clips=12, stills=12, held_out=4)
    return folder


def settings(demo: Path, save: Path, **args: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "args": {
            "experiment_name": "test", "train_iters": 4, "eval_interval": 2, "eval_iters": 3, "log_interval": 1,
            "lr_decay_style": "constant", "warmup": 0.0, "num_workers": 0, "save": str(save), "save_interval": 100,
            "train_data": [str(demo / "train")], "valid_data": [str(demo / "heldout")], **args,
        },
        "data": {
            "target": "sat_ext.JointImageVideoDataset",
            "params": {"video_size": [64, 64], "fps": 8, "max_num_frames": 9},
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": False},
            "optimizer": {"params": {"torch_adam": True, "lr": 1e-3}},
        },
    }  # fmt: skip


def train(launcher: str, folder: Path, config: dict[str, Any], zero: int = 1) -> subprocess.CompletedProcess[str]:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [*LAUNCHERS[launcher], str(ROOT / "train_video.py")]
    command += ["--base", str(ROOT / f"configs/zero/zero{zero}.yaml"), str(file)]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


def fork(
    server: Server, folder: Path, config: dict[str, Any], zero: int = 1, world: int = 2
) -> subprocess.CompletedProcess[str]:
    """What `train` does, without a launcher and without importing everything once more."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    run = server.start(
        ["--base", str(ROOT / f"configs/zero/zero{zero}.yaml"), str(file)], world=world, folder=folder
    )
    statuses = run.wait(timeout=300)
    return subprocess.CompletedProcess([], max(map(abs, statuses)), "".join(map(run.log, range(world))))


def losses(run: subprocess.CompletedProcess[str]) -> list[float]:
    assert run.returncode == 0, run.stdout[-4000:]
    return [float(x) for x in re.findall(r"total loss (\S+)", run.stdout)]


@pytest.fixture(scope="module")
def by_stage(
    server: Server, demo: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[list[float], str, Path]]:
    """Two ranks, four steps, with every ZeRO stage, and each launcher once."""
    runs = {}
    for stage, launcher in enumerate(["torchrun", "deepspeed", None, None]):
        folder = tmp_path_factory.mktemp(f"zero{stage}")
        config = settings(demo, folder / "save")
        start = partial(train, launcher) if launcher else partial(fork, server)
        run = start(folder, config, zero=stage)
        runs[stage] = losses(run), run.stdout, folder
    return runs


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_with_the_same_losses(by_stage: Any, stage: int) -> None:
    expected, got = by_stage[0][0], by_stage[stage][0]
    assert len(expected) == 4
    assert expected[0] != expected[3]
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_leaves_its_configuration_losses_and_weights(by_stage: Any, stage: int) -> None:
    folder = by_stage[stage][2]
    result = json.loads((folder / "save" / "result.json").read_text())
    assert result["before"].keys() == result["after"].keys() == {"image", "video"}
    assert result["after"] != result["before"]
    (run,) = folder.glob("save/test-*")
    config = yaml.safe_load((run / "training_config.yaml").read_text())
    assert config["deepspeed"]["zero_optimization"]["stage"] == stage
    evaluations = [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]
    assert [e["iteration"] for e in evaluations] == [0, 2, 4]
    assert list((folder / "save" / "runs").rglob("events.out.tfevents.*"))  # TensorBoard, by SAT's writer

    engine, iteration = load_engine(run)
    assert iteration == 4
    assert all(p.isfinite().all() and p.numel() > 0 for p in engine.parameters())


@pytest.mark.multiprocess
def test_the_report_shows_what_the_run_has_logged(by_stage: Any, tmp_path: Path) -> None:
    losses, output, folder = by_stage[1]
    done = CliRunner().invoke(app, ["report", str(folder / "save"), "-o", str(tmp_path / "run.html")])
    assert done.exit_code == 0, done.output
    run = read_run(folder / "save")
    assert list(run.scalars["train_loss"].values()) == pytest.approx(losses, rel=1e-4)
    assert [row["iteration"] for row in run.steps] == [1, 2, 3, 4] and len(run.starts) == 1
    for row in run.steps:
        assert row["seconds"].keys() == {"data", "encode", "forward", "backward", "optimizer"}
        assert min(row["seconds"].values()) >= 0 and row["samples"] >= 2 and row["tokens"] >= 2 * row["samples"]
    held_out = {kind: list(of) for kind, of in run.held_out.items()}
    assert held_out == {"image": [0, 2, 4], "video": [0, 2, 4]}
    text = (tmp_path / "run.html").read_text()
    assert "All 4 steps are done." in text and "started on 2 ranks" in text


@pytest.mark.multiprocess
def test_the_progress_line_tells_losses_by_kind_speed_and_time_left(by_stage: Any) -> None:
    output = by_stage[2][1]
    assert re.search(r"step \d/4  .*loss_(image|video) \d\.\d+.*  [\d.]+ samples/s  ETA 0:00:\d\d", output)
    assert re.search(r"validation loss at iteration 4 .*loss_image .*loss_video", output)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("data", "params", "fsp", 8), "error: data.params: unknown key 'fsp'; did you mean 'fps'?"),
        (("args", "trainiters", 8), "error: args: unknown key 'trainiters'; did you mean 'train_iters'?"),
        (("modell", {}), "unknown key 'modell'; did you mean 'model'?"),
        (("args", "train_data", ["nowhere"]), "error: nowhere: "),
        (("data", "params", "sources", [{"path": "x", "sampler": "frist_frame"}]), "did you mean 'first_frame'?"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    server: Server, demo: Path, tmp_path: Path, change: Any, message: str
) -> None:
    config = settings(demo, tmp_path / "save")
    section: Any = config
    for key in change[:-2]:
        section = section[key]
    section[change[-2]] = change[-1]
    by_python = message.startswith("error: data.params")  # one goes through the entry script itself
    run = train("python", tmp_path, config) if by_python else fork(server, tmp_path, config, world=1)
    assert run.returncode != 0
    assert message in run.stdout
    assert "Traceback" not in run.stdout
    assert "building VideoDiffusionEngine" not in run.stdout


@pytest.mark.multiprocess
def test_samples_of_each_kind_are_kept_for_every_evaluation(by_stage: Any) -> None:
    for stage in range(4):
        (run,) = by_stage[stage][2].glob("save/test-*")
        names = sorted(p.name for p in (run / "samples").iterdir())
        assert names == [f"{i:08d}_{kind}.png" for i in (0, 2, 4) for kind in ("image", "video")]


@pytest.mark.multiprocess
def test_sample_command_shows_held_out_captions_and_prompts(by_stage: Any, tmp_path: Path) -> None:
    folder = by_stage[2][2] / "save"
    sheet, clip = tmp_path / "s.png", tmp_path / "s.mp4"
    options = ["--steps", "2", "--sheet", str(sheet), "--clip", str(clip)]
    done = CliRunner().invoke(app, ["sample", str(folder), "--number", "2", *options])
    assert done.exit_code == 0, done.output
    assert "checkpoint of step 4" in done.output
    assert "4 samples in" in done.output
    with Image.open(sheet) as image:
        assert image.width > 500
    with av.open(str(clip)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    done = CliRunner().invoke(
        app, ["sample", str(folder), "--prompt", "a red circle on black", "--frames", "1", *options]
    )
    assert "1 samples in" in done.output


@pytest.mark.multiprocess
def test_score_command_counts_what_held_out_samples_show(by_stage: Any) -> None:
    folder = by_stage[2][2] / "save"
    before = json.loads((folder / "result.json").read_text())
    done = CliRunner().invoke(app, ["score", str(folder), "--number", "3"])
    assert done.exit_code == 0, done.output
    result = json.loads((folder / "result.json").read_text())
    assert {**before, "samples": result["samples"]} == result
    assert list(result["samples"]["image"]) == ["samples", "colour", "background", "shape"]
    assert list(result["samples"]["video"]) == ["samples", "colour", "background", "shape", "direction"]
    for counts in result["samples"].values():
        assert counts["samples"] == 3 and all(0 <= n <= 3 for n in counts.values())
    assert "images that show what was asked for: samples 3, colour " in done.output


@pytest.mark.multiprocess
def test_sample_command_names_what_is_wrong(by_stage: Any, tmp_path: Path) -> None:
    folder = by_stage[2][2] / "save"
    with pytest.raises(ConfigError, match="no checkpoint here"):
        find_run(tmp_path)
    done = CliRunner().invoke(app, ["sample", str(folder), "--prompt", "x", "--frames", "3"])
    assert "the model was not trained on 3 frames; use one of 1, 9" in str(done.exception)
    broken = tmp_path / "run"
    shutil.copytree(find_run(folder), broken)
    weights = broken / "4" / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="not a checkpoint of ours, or a truncated one"):
        load_engine(broken)
    torch.save({"module": {}, "code": Path}, weights)  # a checkpoint must not bring code of its own
    with pytest.raises(ConfigError, match="not a checkpoint of ours"):
        load_engine(broken)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_from_its_checkpoint(
    server: Server, by_stage: Any, demo: Path, tmp_path: Path, stage: int
) -> None:
    (run,) = by_stage[stage][2].glob("save/test-*")
    config = settings(demo, tmp_path / "save", load=str(run), train_iters=6)
    resumed = fork(server, tmp_path, config, zero=stage)
    assert len(losses(resumed)) == 2
    assert re.search(r"iteration +5/ +6 ", resumed.stdout)
    before = (run / "heldout.jsonl").read_text().splitlines()[-1]
    first = next(tmp_path.glob("save/*/heldout.jsonl")).read_text().splitlines()[0]
    assert json.loads(first) == pytest.approx(json.loads(before), rel=1e-4)


@pytest.mark.multiprocess
def test_files_that_all_break_end_the_run_in_one_sentence(demo: Path, tmp_path: Path) -> None:
    """The error starts in a data worker of each of two ranks; nothing hangs."""
    folder = tmp_path / "train"
    folder.mkdir()
    for file in (demo / "train" / "stills").glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes()[:100])  # the header says that all is well
        shutil.copy(file.with_suffix(".txt"), folder)
    config = settings(demo, tmp_path / "save", train_data=[str(folder)], num_workers=1)
    config["data"]["params"]["on_bad_sample"] = {"skip": 1, "consecutive": 3}
    run = train("torchrun", tmp_path, config)
    assert run.returncode != 0
    assert re.search(
        r"^error: \d+ files could not be read, .*more than data.params.on_bad_sample allows", run.stdout, re.M
    )
