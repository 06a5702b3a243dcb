"""The data class as SAT uses it: through its own make_data_loader, AlterDataset and argument names."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sat.data_utils.configure_data import make_data_loader, make_dataset_full

import sat_ext
from sat_ext.config import read_yaml
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError, DataError
from sat_ext.pixels import to_model_range
from sat_ext.sat import shared_memory
from sat_ext.sat.dataset import _new_name

TINY = str(Path(__file__).parents[2] / "configs" / "model" / "tiny.yaml")
PARAMS = {"video_size": [64, 64], "fps": 8, "max_num_frames": 9, "skip_frms_num": 0.0}
MakeArgs = Callable[..., Namespace]


def sat_iterator(
    args: Namespace, params: dict[str, Any] = PARAMS, split: str = "train_data"
) -> Iterator[dict[str, Any]]:
    """What SAT makes of our class: its data set, its loader, its iterator."""

    def create(path: str, args: Namespace) -> Any:
        return sat_ext.JointImageVideoDataset.create_dataset_function(path, args, **params)

    weights = args.train_data_weights
    train = make_dataset_full(args.train_data, [1.0], args, create, dataset_weights=weights, is_train_data=True)
    data = train if split == "train_data" else make_dataset_full(args.valid_data, [1.0], args, create)
    args.strict_eval, args.prefetch_factor = False, 2
    return iter(make_data_loader(data, args.batch_size, args, split))


def keys(batches: Iterator[dict[str, Any]], count: int) -> list[list[str]]:
    return [b["key"] for b in islice(batches, count)]


def test_batches_have_the_documented_keys_shapes_and_values(sat_args: MakeArgs) -> None:
    seen = set()
    for batch in islice(sat_iterator(sat_args()), 8):
        b, t, c, h, w = batch["mp4"].shape
        assert (c, h, w) == (3, 64, 64)
        assert batch["mp4"].dtype == torch.bfloat16
        assert batch["mp4"].abs().max() <= 1
        assert batch["num_frames"].dtype == batch["fps"].dtype == torch.int64
        assert len(batch["txt"]) == len(batch["kind"]) == len(batch["key"]) == len(batch["num_frames"]) == b
        assert t == (1 if batch["kind"][0] == "image" else 9)
        seen.add((batch["kind"][0], b))
    images = {b for kind, b in seen if kind == "image"}
    assert {kind for kind, _ in seen} == {"image", "video"}
    assert max(images) > 1  # image batches are larger by cost: 2 clips of 9 frames take as much as 3 stills


def test_our_engine_gets_uint8_and_others_their_training_dtype(sat_args: MakeArgs) -> None:
    """uint8 is what the frames are; our engine makes [-1, 1] of it on its device, CogVideo's would not."""
    packs = islice(sat_iterator(sat_args(model_config=read_yaml([TINY])["model"])), 3)
    ours = {key: clip for pack in packs for g in pack["groups"] for key, clip in zip(g["key"], g["mp4"])}
    theirs = {"network_config": {"params": {"hidden_size": 1920}}}
    for precision, dtype in (
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": False, "fp16": True}, torch.float16),
        ({"bf16": False}, torch.float32),
    ):
        batch = next(sat_iterator(sat_args(model_config=theirs, **precision)))
        assert batch["mp4"].dtype == dtype
        assert batch["mp4"].abs().max() <= 1
    for key, pixels in zip(batch["key"], batch["mp4"], strict=True):
        assert ours[key].dtype == torch.uint8
        assert torch.equal(to_model_range(ours[key], torch.float32), pixels)


def test_our_engine_gets_packs_of_several_shapes(sat_args: MakeArgs) -> None:
    """2 clips of 9 frames and 2 stills, or as many tokens: 3 latent frames of 64 tokens and those of the text."""
    model = read_yaml([TINY])["model"]
    text, grid = model["transformer"]["max_text_seq_length"], (64 // 8) ** 2
    budget = 2 * (text + 3 * grid) + 2 * (text + grid)
    for batch in islice(sat_iterator(sat_args(model_config=model)), 12):
        assert batch.keys() == {"groups"}
        shapes = [group["mp4"].shape for group in batch["groups"]]
        assert {shape[1] for shape in shapes} == {1, 9}
        assert sum(shape[0] * (text + grid * (1 + (shape[1] - 1) // 4)) for shape in shapes) <= budget
        for group in batch["groups"]:
            count = len(group["mp4"])
            assert {len(group[key]) for key in ("txt", "kind", "key", "loss_weight", "timestep")} == {count}


def test_a_progress_bar_is_shown_where_there_is_something_to_wait_for(
    sat_args: MakeArgs, demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sat_ext.sat.dataset.MANY_FILES", 3)
    for still in (demo / "train" / "stills").iterdir():
        os.utime(still, ns=(0, 1))  # to be probed again
    sat_iterator(sat_args())
    assert "probing files" in capsys.readouterr().out
    sat_iterator(sat_args())  # all are known by now
    assert "probing files" not in capsys.readouterr().out


def test_a_longest_bucket_without_clips_is_warned_of_at_the_start(
    sat_args: MakeArgs, caplog: pytest.LogCaptureFixture
) -> None:
    sat_iterator(sat_args())
    assert "longest bucket" not in caplog.text
    sat_iterator(sat_args(), {**PARAMS, "max_num_frames": 49})
    assert "train_data: warning: none of the 12 clips is long enough for the longest bucket (49 " in caplog.text


def test_workers_do_not_change_the_batches(sat_args: MakeArgs) -> None:
    alone = list(islice(sat_iterator(sat_args()), 6))
    workers = list(islice(sat_iterator(sat_args(num_workers=2)), 6))
    for a, b in zip(alone, workers):
        assert a["key"] == b["key"]
        assert torch.equal(a["mp4"], b["mp4"])


def test_a_resumed_run_goes_on_where_it_stopped(sat_args: MakeArgs) -> None:
    straight = keys(sat_iterator(sat_args(gradient_accumulation_steps=2)), 12)
    args = sat_args(gradient_accumulation_steps=2)
    iterator_later = sat_iterator_after(args, iteration=4)
    assert keys(iterator_later, 4) == straight[8:]


def sat_iterator_after(args: Namespace, iteration: int) -> Iterator[dict[str, Any]]:
    """SAT builds the data set first, loads the checkpoint, and only then asks for the iterator."""

    def create(path: str, args: Namespace) -> Any:
        return sat_ext.JointImageVideoDataset.create_dataset_function(path, args, **PARAMS)

    data = make_dataset_full(args.train_data, [1.0], args, create, is_train_data=True)
    loader = make_data_loader(data, args.batch_size, args, "train")
    args.iteration = iteration
    return iter(loader)


def test_all_entries_of_train_data_share_one_stream(sat_args: MakeArgs, demo: Path) -> None:
    """SAT draws among entries with a seed that differs per rank: whatever it draws, the same batches come."""
    entries = [str(demo / "train" / "videos"), str(demo / "train" / "stills")]
    runs = [keys(sat_iterator(sat_args(train_data=entries, seed=seed)), 8) for seed in (1, 2)]
    assert runs[0] == runs[1]
    sources = [b["source"][0] for b in islice(sat_iterator(sat_args(train_data=entries)), 20)]
    assert set(sources) == {"videos", "stills"}


def test_train_data_weights_are_shares(sat_args: MakeArgs, demo: Path) -> None:
    entries = [str(demo / "train" / "videos"), str(demo / "train" / "stills")]
    batches = islice(sat_iterator(sat_args(train_data=entries, train_data_weights=[3, 1])), 60)
    counts = {"videos": 0, "stills": 0}
    for batch in batches:
        counts[batch["source"][0]] += len(batch["txt"])
    assert abs(counts["videos"] - 0.75 * sum(counts.values())) <= 4


def test_the_same_folder_may_be_trained_and_evaluated_on(sat_args: MakeArgs, demo: Path) -> None:
    same = [str(demo / "train")]
    args = sat_args(train_data=same, valid_data=same)
    batches = sat_iterator(args, split="val")
    assert keys(batches, 6)[:4] == keys(sat_iterator(sat_args(train_data=same, valid_data=same), split="val"), 4)


def test_every_evaluation_sees_the_same_samples(sat_args: MakeArgs) -> None:
    seen = keys(sat_iterator(sat_args(num_workers=2), split="val"), 12)  # 3 clips and 3 stills, 2 in a batch
    assert seen[:4] == seen[4:8] == seen[8:12]
    assert len({k for batch in seen[:4] for k in batch}) == 6


def test_first_frame_sources_give_stills_of_clips(sat_args: MakeArgs, demo: Path) -> None:
    videos = str(demo / "train" / "videos")
    params = {
        **PARAMS,
        "sources": [
            {"name": "clips", "path": videos, "share": 0.5},
            {"name": "first", "path": videos, "share": 0.5, "sampler": "first_frame"},
        ],
    }
    kinds: dict[str, set[str]] = {"clips": set(), "first": set()}
    for batch in islice(sat_iterator(sat_args(), params), 12):
        kinds[batch["source"][0]].add(batch["kind"][0])
        assert (batch["num_frames"] == 1).all() or batch["kind"][0] == "video"
    assert kinds["first"] == {"image"}
    assert "video" in kinds["clips"]


def test_first_frame_dataset_needs_no_sources(sat_args: MakeArgs) -> None:
    data = sat_ext.FirstFrameDataset.create_dataset_function(sat_args().train_data[0], sat_args(), **PARAMS)
    assert {b["kind"][0] for b in islice(iter(data), 6)} == {"image"}


def test_without_iterable_dataset_the_two_missing_lines_are_shown(sat_args: MakeArgs) -> None:
    with pytest.raises(
        ConfigError, match=r"add the two lines 'iterable_dataset: custom' and 'iterable_dataset_eval: custom'"
    ):
        sat_iterator(sat_args(iterable_dataset=False, iterable_dataset_eval="", epochs=None, train_iters=5))


def test_the_second_of_the_two_lines_is_missed_as_well(sat_args: MakeArgs) -> None:
    """SAT reads it for the held-out data, and CogVideo's script gives it no default."""
    args = sat_args(iterable_dataset_eval="", eval_interval=100, epochs=None, train_iters=5)
    with pytest.raises(
        ConfigError,
        match=r"args\.iterable_dataset_eval: '' makes SAT stack .*; add the two lines 'iterable_dataset: custom'",
    ):
        sat_iterator(args, split="val")


def test_an_unknown_key_names_the_nearest(sat_args: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=r"data\.params: unknown key 'video_sizes'; did you mean 'video_size'\?"):
        sat_iterator(sat_args(), {**PARAMS, "video_sizes": [64, 64]})


def test_a_size_the_model_cannot_take_is_refused_before_it_is_built(sat_args: MakeArgs) -> None:
    with pytest.raises(
        ConfigError, match=r"video_size: \[60, 64\] \(height, width\) is not in multiples of 16; use \[64, 64\]"
    ):
        sat_iterator(sat_args(), {**PARAMS, "video_size": [60, 64]})


def test_an_empty_folder_is_refused(sat_args: MakeArgs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image or video|holds no"):
        sat_iterator(sat_args(train_data=[str(tmp_path)]))


def test_stills_under_cogvideos_own_i2v_engine_need_our_loss(sat_args: MakeArgs) -> None:
    model: dict[str, Any] = {"noised_image_input": True, "network_config": {"params": {"hidden_size": 3072}}}
    with pytest.raises(
        ConfigError, match="would show a still .* its target as the condition; name .*JointDiffusion"
    ):
        sat_iterator(sat_args(model_config=model))
    clips = sat_iterator(sat_args(model_config=model), {**PARAMS, "buckets": {"frames": [9]}})
    assert next(clips)["kind"][0] == "video"
    text_to_video = {"network_config": {"params": {"hidden_size": 1920}}}
    with_our_loss = {**model, "loss_fn_config": {"target": "sat_ext.cogvideo.JointDiffusionLoss"}}
    for other in (text_to_video, with_our_loss):
        batches = islice(sat_iterator(sat_args(model_config=other)), 8)
        assert {b["kind"][0] for b in batches} == {"image", "video"}


def test_all_ranks_save_into_the_first_ones_folder(sat_args: MakeArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAT adds the time to the name, on every rank by its own clock."""

    def of_first_rank(make: Callable[[], Any]) -> Any:
        made = make()
        return "run-11-24-10-30" if made == "run-11-24-10-31" else made

    monkeypatch.setattr("sat_ext.sat.dataset.share_from_first_rank", of_first_rank)
    args = sat_args(experiment_name="run-11-24-10-31")
    sat_iterator(args)
    assert args.experiment_name == "run-11-24-10-30"


def test_a_run_of_the_same_minute_gets_a_folder_of_its_own(sat_args: MakeArgs, tmp_path: Path) -> None:
    (tmp_path / "run-11-24-10-31").mkdir()
    (tmp_path / "run-11-24-10-31-2").mkdir()
    args = sat_args(experiment_name="run-11-24-10-31", save=str(tmp_path))
    sat_iterator(args)
    assert args.experiment_name == "run-11-24-10-31-3"
    going_on = sat_args(experiment_name="run-11-24-10-31", save=str(tmp_path), load=str(tmp_path / "run"))
    assert _new_name(going_on) == "run-11-24-10-31"


def test_ranks_that_share_a_model_are_sent_what_the_script_has_them_receive() -> None:
    engine = engine_of({"network_config": {"params": {"hidden_size": 64}}})
    assert engine.batch_dtype(torch.bfloat16) == torch.bfloat16
    assert engine.batch_dtype(torch.bfloat16, model_parallel=2) == torch.float32


def test_entries_of_one_name_are_told_apart_by_their_paths(sat_args: MakeArgs, demo: Path) -> None:
    entries = [str(demo / "train" / "videos"), str(demo / "heldout" / "videos")]
    batches = islice(sat_iterator(sat_args(train_data=entries)), 20)
    assert {b["source"][0] for b in batches} == set(entries)


def test_batches_that_do_not_fit_into_shared_memory_are_refused_at_the_start(
    sat_args: MakeArgs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 2 clips, 9 x 3 x 64 x 64 in bf16, 3 of each of 4 workers for each of two lists."""
    largest = 2 * 2 * 9 * 3 * 64 * 64
    create = partial(sat_ext.JointImageVideoDataset.create_dataset_function, "", **PARAMS)
    monkeypatch.setattr(shared_memory, "_free", lambda: 2 * 4 * 3 * largest)
    args = sat_args(num_workers=4, prefetch_factor=3)
    for lists in (1, 2):
        create(args)
        assert args.sat_ext.shared_memory == lists * 4 * 3 * largest
    monkeypatch.setattr(shared_memory, "_free", lambda: 4 * 3 * largest - 1)
    with pytest.raises(
        ConfigError, match=r"/dev/shm: 5 MB are free, but batches of up to 1 MB.* --shm-size=1g, or"
    ):
        create(sat_args(num_workers=4, prefetch_factor=3))
    create(sat_args(num_workers=0))


def test_what_is_free_is_that_of_a_container(tmp_path: Path) -> None:
    """64 MB, as Docker gives by default."""
    look = f"mount -t tmpfs -o size=64m none /dev/shm && exec {sys.executable} -c "
    code = "'from sat_ext.sat import shared_memory; print(shared_memory._free())'"
    run = subprocess.run(["unshare", "-m", "sh", "-c", look + code], capture_output=True, text=True, check=False)
    if run.returncode and not run.stdout:
        pytest.skip(f"/dev/shm cannot be mounted here, which takes root ({run.stderr.strip()[-80:]})")
    assert run.stdout.splitlines()[-1] == str(64 << 20)
