"""CogVideo's unmodified script trains stills and clips together, with its own YAMLs and ours behind them."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import av
import pytest
import tiny
import torch
import yaml
from conftest import Checkout, Launch, Run

pytestmark = pytest.mark.multiprocess
T2V = {"1.0": ("cogvideox_2b", ["joint"]), "1.5": ("cogvideox1.5_5b", ["joint", "1.5"])}
I2V = {
    "1.0": ("cogvideox_5b_i2v_lora", ["joint", "i2v"]),
    "1.5": ("cogvideox1.5_5b_i2v", ["joint", "i2v", "1.5", "lora"]),
}
BOTH = {"image", "video"}


@pytest.fixture(scope="module")
def t2v(checkout: Checkout, launch: Launch) -> Run:
    """Six steps on one rank, an evaluation and a checkpoint of the full state after three and after six."""
    model, overlays = T2V[checkout.generation]
    return launch(
        model, overlays, train_iters=6, eval_interval=3, eval_iters=2, save_interval=3,
        only_log_video_latents=checkout.generation == "1.5",  # the main branch cannot decode a still
    )  # fmt: skip


@pytest.fixture(scope="module")
def three_lines(checkout: Checkout, launch: Launch) -> Run:
    """Four steps with no overlay: our data, and else CogVideo's loss, first stage and kind of checkpoint.

    Without our loss, 1.5 takes clips of an even number of latent frames only, and its text-to-video file has to be
    told that they come as pixels.
    """
    settings: dict[str, Any] = dict(tiny.OURS)
    if checkout.generation == "1.5":
        settings["data"] = {**settings["data"], "params": {"buckets": {"frames": [13]}}}
        settings["model"] = {"latent_input": False}
    return launch(
        T2V[checkout.generation][0], (), settings, train_iters=4, eval_interval=4, eval_iters=1, save_interval=2,
        only_log_video_latents=checkout.generation == "1.0",
    )  # fmt: skip


@pytest.fixture(scope="module")
def i2v(checkout: Checkout, launch: Launch) -> Run:
    """Image-to-video with LoRA on two ranks, ZeRO-2."""
    model, overlays = I2V[checkout.generation]
    return launch(
        model, overlays, launcher="torchrun", train_iters=4, eval_interval=4, eval_iters=2, save_interval=4
    )


@pytest.fixture(scope="module")
def zero3(checkout: Checkout, launch: Launch) -> Run:
    """Text-to-video on two ranks, ZeRO-3, checkpoints of the weights."""
    model, overlays = T2V[checkout.generation]
    settings = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    weights = {"checkpoint": "weights", "keep_last": None}
    return launch(
        model, overlays, settings, launcher="deepspeed", train_iters=3, eval_interval=3, eval_iters=2, **weights
    )


@pytest.mark.parametrize("name", ["t2v", "i2v", "zero3"])
def test_both_kinds_train_with_finite_losses(
    name: str, checkout: Checkout, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(name)
    for rank in range(len(run.records)):
        assert run.kinds(rank=rank) == BOTH
        assert all(math.isfinite(loss) and loss > 0 for loss in run.losses(rank))


@pytest.mark.parametrize("name", ["t2v", "i2v", "zero3"])
def test_losses_of_both_kinds_are_logged_in_training_and_evaluation(
    name: str, checkout: Checkout, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(name)
    trained = [line for line in run.log.splitlines() if re.search(r"\] {1,2}iteration +\d+/", line)]
    evaluated = [line for line in run.log.splitlines() if "validation loss at" in line]
    assert trained
    assert evaluated
    for lines in (trained, evaluated):
        found = [float(x) for line in lines for x in re.findall(r"loss_(?:image|video) ([-+.\deE]+|nan)", line)]
        assert found and all(0 < loss < 100 for loss in found)
        assert all(any(f"loss_{kind}" in line for line in lines) for kind in BOTH)
    assert run.kinds("valid") == BOTH


@pytest.mark.parametrize("name", ["i2v", "zero3"])
def test_ranks_train_on_the_same_shapes_and_different_samples(
    name: str, checkout: Checkout, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(name)
    first, second = run.steps(rank=0), run.steps(rank=1)
    assert [s["shape"] for s in first] == [s["shape"] for s in second]
    for a, b in zip(first, second, strict=True):
        assert not set(a["key"]) & set(b["key"])


def test_the_evaluation_shows_videos_or_latents(t2v: Run, three_lines: Run) -> None:
    decoded, latents = (t2v, three_lines) if (t2v.folder / "video" / "samples_gs-000003").exists() else (
        three_lines, t2v,
    )  # fmt: skip
    videos = sorted((decoded.folder / "video").glob("*/*.mp4"))
    assert {v.parent.name.partition("_")[0] for v in videos} == {"inputs", "reconstructions", "samples"}
    for video in videos:
        with av.open(str(video)) as container:
            frame = next(container.decode(video=0))
            assert (frame.height, frame.width) == tiny.SIZE
    (first, *_) = sorted((latents.folder / "video" / "latents").glob("*/latent.pt"))
    sampled = torch.load(first)
    assert sampled.isfinite().all()
    assert (16, *(side // 8 for side in tiny.SIZE)) == (sampled.shape[1], *sampled.shape[3:])
    assert list((t2v.folder / "video_texts").iterdir())


def test_full_checkpoints_and_the_merged_yaml_are_written(t2v: Run) -> None:
    assert (t2v.folder / "latest").read_text() == "6"
    states = {step: json.loads((t2v.folder / step / "sat_ext.json").read_text()) for step in ("3", "6")}
    assert [states[step]["iteration"] for step in ("3", "6")] == [3, 6]
    config = yaml.safe_load((t2v.folder / "training_config.yaml").read_text())
    assert config["data"]["target"] == "sat_ext.JointImageVideoDataset"
    assert config["model"]["loss_fn_config"]["target"] == "sat_ext.cogvideo.JointDiffusionLoss"


def test_a_run_resumed_from_its_full_state_goes_on_bit_for_bit(
    checkout: Checkout, launch: Launch, t2v: Run, tmp_path: Path
) -> None:
    halfway = Path(shutil.copytree(t2v.folder, tmp_path / t2v.folder.name))
    shutil.rmtree(halfway / "6")
    (halfway / "latest").write_text("3")
    model, overlays = T2V[checkout.generation]
    resumed = launch(
        model, overlays, mode="pretrain", load=str(halfway), train_iters=6, eval_interval=3, eval_iters=2,
        save_interval=3,
    )  # fmt: skip
    assert [s["iteration"] for s in resumed.steps()] == [3, 4, 5]
    assert resumed.keys() == [k for s in t2v.steps()[3:] for k in s["key"]]
    assert resumed.losses() == t2v.losses()[3:]


def test_weights_alone_resume_at_their_step_and_place_in_the_data(
    checkout: Checkout, launch: Launch, three_lines: Run
) -> None:
    assert all(math.isfinite(loss) for loss in three_lines.losses())
    assert sorted(p.name for p in three_lines.folder.iterdir() if p.name.isdigit()) == ["2", "4"]
    assert not list(three_lines.folder.rglob("sat_ext.json"))
    settings: dict[str, Any] = dict(tiny.OURS)
    if checkout.generation == "1.5":
        settings["data"] = {**settings["data"], "params": {"buckets": {"frames": [13]}}}
        settings["model"] = {"latent_input": False}
    resumed = launch(
        T2V[checkout.generation][0], (), settings, mode="pretrain", load=str(three_lines.folder), train_iters=6
    )
    assert [s["iteration"] for s in resumed.steps()] == [4, 5]
    assert not set(resumed.keys()) & set(three_lines.keys())  # six records of a kind, none used twice yet


def test_a_lora_checkpoint_holds_what_is_trained(i2v: Run) -> None:
    saved = torch.load(i2v.folder / "4" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    trained = {name for name in saved if "matrix_A" in name or "matrix_B" in name}
    assert {name.rpartition(".")[2] for name in set(saved) - trained} <= {"freqs_sin", "freqs_cos"}  # buffers
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "matrix_B" in name)


def test_a_zero3_checkpoint_holds_the_whole_model(checkout: Checkout, zero3: Run) -> None:
    model, _ = T2V[checkout.generation]
    base = torch.load(checkout.tiny / model / "transformer" / "1" / "mp_rank_00_model_states.pt")["module"]
    saved = torch.load(zero3.folder / "3" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    shapes = {name: weight.shape for name, weight in saved.items() if name in base}
    assert shapes == {name: weight.shape for name, weight in base.items()}
    assert any(not torch.equal(saved[name], weight) for name, weight in base.items())


def unfit(case: str, checkout: Checkout, folder: Path) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    """Overlays, settings and arguments of a run that cannot train, and how the sentence about it begins."""
    _, overlays = T2V[checkout.generation]
    if case == "data" and checkout.generation == "1.0":  # our data class without the other two lines
        settings = {"data": tiny.OURS["data"], "deepspeed": {"train_micro_batch_size_per_gpu": 2}}
        return [], settings, {}, "args.iterable_dataset: "
    if case == "data":  # an odd number of latent frames
        return [], {**tiny.OURS, "model": {"latent_input": False}}, {}, "data.params.buckets.frames: "
    if case == "overlay":
        other = {"1.0": "1.5", "1.5": "sizes-5b"}[checkout.generation]
        return [*overlays, other], {}, {}, "model.sat_ext_overlay: "
    weights = folder / "transformer" / "1" / "mp_rank_00_model_states.pt"
    weights.parent.mkdir(parents=True)
    (weights.parent.parent / "latest").write_text("1")
    if case == "truncated":
        whole = next(checkout.tiny.rglob(weights.name)).read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
    else:
        torch.save({"module": {"a": Foreign(str(folder / "ran"))}}, weights)
    return overlays, {}, {"load": str(weights.parent.parent)}, str(weights)


class Foreign:
    """Makes the file `path` when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("case", ["data", "overlay", "truncated", "foreign"])
def test_what_cannot_train_ends_in_a_sentence(
    case: str, checkout: Checkout, launch: Launch, tmp_path: Path
) -> None:
    overlays, settings, args, beginning = unfit(case, checkout, tmp_path)
    run = launch(T2V[checkout.generation][0], overlays, settings, fails=True, **args)
    assert not any(run.records)
    assert "Traceback" not in run.log
    (sentence,) = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert sentence.startswith(f"error: {beginning}")
    assert not (tmp_path / "ran").exists()


def test_a_source_can_be_taught_by_the_base(checkout: Checkout, launch: Launch, media: Path) -> None:
    """CogVideo's LoRA is switched off for it: before the first update it adds nothing, so there is no loss."""
    model, overlays = I2V[checkout.generation]
    path = str(media / "train")
    sources = [
        {"path": path, "name": "stills", "kind": "image", "share": 1},
        {"path": path, "name": "clips", "kind": "video", "share": 1, "target": "base"},
    ]
    settings = {
        "data": {"params": {"sources": sources}},
        "deepspeed": {"gradient_accumulation_steps": 2, "optimizer": {"params": {"lr": 0.05}}},
    }
    run = launch(model, overlays, settings, train_iters=4, valid_data=None, train_data=None)
    found = [float(value) for value in re.findall(r"\bloss_base ([-+.\dE]+)", run.log)]
    assert len(found) == 4 and found[0] == 0 < found[-1], run.log
    assert "loss_video" not in run.log and "loss_image" in run.log
