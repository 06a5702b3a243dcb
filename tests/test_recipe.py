from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sat_ext.errors import ConfigError
from sat_ext.recipe import Recipe, read_recipe
from sat_ext.types import Bucket

CONFIGS = Path(__file__).parents[1] / "configs"
DATA = "data: {params: {video_size: [64, 64], max_num_frames: 9, sources: [{path: a}]}}"


def write(folder: Path, *texts: str) -> list[str]:
    paths = [folder / f"{i}.yaml" for i in range(len(texts))]
    for path, text in zip(paths, texts):
        path.write_text(text)
    return [str(p) for p in paths]


def load_base(paths: list[str]) -> Recipe:
    return read_recipe(paths).checked()


def test_later_files_win(tmp_path: Path) -> None:
    run = load_base(write(tmp_path, DATA, "data: {params: {fps: 16}}\ndeepspeed: {bf16: {enabled: true}}"))
    assert run.data.fps == 16
    assert run.data.video_size == (64, 64)
    assert run.dtype == torch.bfloat16


def test_the_shipped_demo_yields_what_training_reads() -> None:
    names = ("model/tiny", "data/demo", "zero/zero1", "train/demo")
    run = load_base([str(CONFIGS / f"{n}.yaml") for n in names])
    assert [s.name for s in run.sources] == ["clips", "stills", "first"]
    assert [s.path for s in run.held_out] == ["runs/demo/data/heldout"]
    assert (run.micro_batch, run.num_workers, run.train_iters, run.dtype) == (4, 1, 1000, torch.float32)
    clip, still = Bucket(frames=9, height=64, width=64), Bucket(frames=1, height=64, width=64)
    assert run.step_size.budget == 4 * (run.step_size.tokens[clip] + run.step_size.tokens[still])
    assert run.shape.hidden_size == 64


def test_without_its_folder_a_model_has_the_sizes_of_its_yaml() -> None:
    run = load_base([str(CONFIGS / "model/cogvideox-5b-i2v.yaml"), str(CONFIGS / "data/joint.yaml")])
    assert (run.shape.hidden_size, run.shape.text_length) == (3072, 226)
    assert run.micro_batch == 4  # SAT's default


def test_train_data_stands_for_sources(tmp_path: Path) -> None:
    text = "args: {train_data: [a/clips, b], train_data_weights: [3, 1]}\n" + DATA.replace(
        "sources: [{path: a}]", ""
    )
    run = load_base(write(tmp_path, text.replace(", }", "}")))
    assert [(s.path, s.share) for s in run.sources] == [("a/clips", 3.0), ("b", 1.0)]


def test_the_first_frame_target_takes_first_frames(tmp_path: Path) -> None:
    run = load_base(write(tmp_path, DATA, "data: {target: sat_ext.FirstFrameDataset}"))
    assert [s.sampler for s in run.sources] == ["first_frame"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "no 'data' section in .*; add a file of configs/data/"),
        ("data: [1]", "data: expected a mapping of keys"),
        ("data: {paramz: {}}", "data: unknown key 'paramz'; did you mean 'params'?"),
        (
            "data: {params: {video_sise: [64, 64]}}",
            "data.params: unknown key 'video_sise'; did you mean 'video_size'",
        ),
        ("datas: {}", "unknown key 'datas'; did you mean 'data'"),
        ("a: [", "not valid YAML"),
        (
            DATA + "\ndeepspeed: {bf16: true}",
            "deepspeed.bf16: expected a mapping of keys, got True; write enabled",
        ),
        ("data: {params: {video_size: [64, 64], max_num_frames: 9}}", "args.train_data: nothing to train on"),
        ("data: {target: mine.Own}", "data.target: 'mine.Own' is not a class of sat_ext's; this command reads"),
        (DATA + "\nargs: {num_workers: -1}", "args.num_workers: -1; use 0 or more"),
        (
            DATA + "\ndeepspeed: {train_micro_batch_size_per_gpu: 0}",
            "train_micro_batch_size_per_gpu: 0; use 1 or",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_base(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.yaml"):
        load_base([str(tmp_path / "nowhere.yaml")])


def test_sat_is_not_imported() -> None:
    code = "import sys, sat_ext.recipe; print({'sat', 'deepspeed', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_files_that_are_no_text_or_do_not_merge_are_named(tmp_path: Path) -> None:
    paths = write(tmp_path, DATA, "data: {params: [1]}")
    with pytest.raises(ConfigError, match=r"0\.yaml and .*1\.yaml do not merge"):
        load_base(paths)
    Path(paths[1]).write_bytes(b"data: \x82")
    with pytest.raises(ConfigError, match=r"1\.yaml: not valid YAML"):
        load_base(paths)
