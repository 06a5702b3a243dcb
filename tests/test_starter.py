"""What `sat-ext init` chooses: buckets that fit the data, and what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from sat_ext.cli.main import app
from sat_ext.demo_data import write_demo
from sat_ext.memory.advice import Room
from sat_ext.recipe import read_recipe
from sat_ext.starter import buckets, run
from sat_ext.starter.buckets import candidates, choose_lengths, choose_sizes
from sat_ext.starter.models import MODELS
from sat_ext.starter.render import render
from sat_ext.starter.survey import survey

sides = st.integers(100, 4000)


@given(
    st.lists(st.tuples(sides, sides), min_size=1, max_size=40),
    st.sampled_from([(480, 720), (768, 1360), (64, 64)]),
)
@settings(deadline=None, max_examples=25)
def test_sizes_are_legal_and_cut_less_than_the_native_one(
    shapes: list[tuple[int, int]], native: tuple[int, int]
) -> None:
    sizes = choose_sizes(shapes, native)
    assert 1 <= len(sizes) <= 5 and len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % 16 == 0 and width % 16 == 0
        assert 0.9 * native[0] * native[1] - 1 <= height * width <= native[0] * native[1]
    assert cut(shapes, sizes) <= cut(shapes, [native]) + 0.02  # shapes are rounded, and few gains are left out


def cut(shapes: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> float:
    """The part of a picture that is cropped, on average."""
    ratio = np.array([w / h for w, h in shapes])[:, None] / np.array([w / h for h, w in sizes])
    return float((1 - np.minimum(ratio, 1 / ratio)).min(1).mean())


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=12))
@settings(deadline=None, max_examples=15)
def test_no_other_sizes_are_better(shapes: list[tuple[int, int]]) -> None:
    few = candidates((96, 128), 16)
    chosen = choose_sizes(shapes, (96, 128), most=2)
    best = min(cut(shapes, list(pair)) for pair in itertools.combinations(few, 2))
    assert cut(shapes, chosen) <= best + buckets.LEAST_GAIN + buckets.PREFERENCE + 0.01


@given(st.lists(st.floats(1, 200), min_size=1, max_size=60), st.sampled_from([9, 49, 81]))
@settings(deadline=None)
def test_lengths_are_ones_that_clips_fill(available: list[float], native: int) -> None:
    lengths = choose_lengths(available, native)
    assert lengths == sorted(set(lengths))
    assert all(length <= native and length % 8 == 1 for length in lengths)
    assert bool(lengths) == any(frames >= 9 for frames in available)
    for length in lengths[1:]:
        assert sum(frames >= length for frames in available) >= buckets.RARE * len(available)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "data", clips=12, stills=12, held_out=1)
    return folder / "data/train"


def init(*options: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["init", *map(str, options)])
    return done.exit_code, done.output + str(done.exception or "")


def test_it_writes_a_commented_yaml_and_says_why(demo: Path, tmp_path: Path) -> None:
    status, said = init(demo, "--model", "tiny", "-o", tmp_path / "run")
    assert status == 0, said
    text = (tmp_path / "run.yaml").read_text()
    recipe = read_recipe([str(tmp_path / "run.yaml")]).checked()
    assert {s.part for s in recipe.sources} == {"image", "video"}
    assert recipe.held_out[0].side == "held_out"
    assert "# a guess: 50% of the records are stills" in text
    for words in (
        "12 clips of",
        "12 stills",
        "buckets: 1, 9 frames",
        "held out: 8 of 24",
        "Next:",
        "train_video.py",
    ):
        assert words in said, said
    assert len(said.splitlines()) <= 25
    status, said = init(demo, "--model", "tiny", "-o", tmp_path / "run")
    assert status == 1 and "run.yaml exists; remove it, or name another" in said


@pytest.mark.timeout(1800)  # the planner measures every lever
@pytest.mark.parametrize("name", ["cogvideox-5b-i2v", "cogvideox-1.5-5b", "cogvideox-2b"])
def test_a_published_model_gets_levers_that_fit(
    demo: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_model_config", lambda model: None)  # there are no weights here
    model, output, weights = MODELS[name], tmp_path / "run.yaml", tmp_path / "none"
    found = survey([str(demo)], model.fps, model.native, probing=lambda outcomes, total: outcomes)
    room = Room(gpus=1, per_node=1, gpu_memory=24 * 10**9, host_memory=64 * 10**9)
    choice = run.choose(name, model, [str(demo)], found, output, room, weights=weights)
    output.write_text(render(choice.config, choice.comments, "A run."))
    config = yaml.safe_load(output.read_text())
    assert config["model"]["pretrained"] == str(weights)
    assert config["model"]["train"]["mode"] == "lora"
    assert config["data"]["params"]["fps"] == MODELS[name].fps
    assert config["deepspeed"]["fp16" if name == "cogvideox-2b" else "bf16"]["enabled"]
    assert ("cache" in config["data"]["params"]) == bool(choice.cache)
    assert any("of 24.0 GB a GPU" in reason for reason in choice.reasons)
    assert "zero3" not in str(choice.reasons)  # levers come before what is slower
    read_recipe([str(output)]).checked()


def test_what_cannot_be_is_one_sentence(demo: Path, tmp_path: Path) -> None:
    empty, bare = tmp_path / "empty", tmp_path / "bare"
    for folder in (empty, bare):
        folder.mkdir()
    Image.new("RGB", (64, 64)).save(bare / "a.png")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "a.txt").write_text("no model")
    out = ("-o", tmp_path / "run")
    for options, sentence in (
        ((empty, "--model", "tiny"), "no image or video in this folder"),
        ((bare, "--model", "tiny"), "1 of 1 media files have no caption"),
        ((tmp_path / "none", "--model", "tiny"), "no such file or folder"),
        ((demo, "--model", "cogvideox-5b"), "--weights: missing; name the model's folder"),
        ((demo, "--model", "cogvideo-5b"), "did you mean 'cogvideox-5b'?"),
        ((demo, "--model", "cogvideox-5b", "--weights", tmp_path / "none"), "--weights: there is no folder"),
        ((demo, "--model", "cogvideox-5b", "--weights", weights), "transformer/"),
        ((demo, "--model", "tiny", "--weights", weights), "--weights: tiny has none; leave it out"),
        ((demo, "--model", "tiny", "--gpu-memory", "100MB"), "Nothing fits 0.1 GB a GPU"),
        ((demo, "--model", "tiny", "--cogvideo", tmp_path), "the tiny models are not CogVideo's"),
        ((demo, "--model", "cogvideox-5b", "--cogvideo", tmp_path), "name the folder CogVideo/sat of tag v1.0"),
    ):
        status, said = init(*options, *out)
        assert status == 1 and sentence in said, (options, said)
    assert not (tmp_path / "run.yaml").exists()
