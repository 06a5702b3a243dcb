"""The index over real files: parts, windows, weights, what is left out, and in which order."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sat_ext.config import load
from sat_ext.data.columns import item_batches
from sat_ext.data.index import Index, build_index, clip_lengths, longest_is_rare
from sat_ext.data.index.place import visits_by_weight
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import DataError
from sat_ext.types import Bucket, Item
from tests.media import write_clip

STILL = Bucket(frames=1, height=64, width=64)
CLIP = Bucket(frames=9, height=64, width=64)


def config(**changes: Any) -> DataConfig:
    return load(DataConfig, {"video_size": [64, 64], "max_num_frames": 9, **changes}, "data.params")


def write_still(path: Path, size: tuple[int, int] = (80, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 40, 90)).save(path)
    return path


def write_table(folder: Path, rows: list[dict[str, Any]]) -> SourceConfig:
    table = folder / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return SourceConfig(path=str(table))


def keys(index: Index, group: int = 0) -> list[str]:
    return [index.item(int(row))[0].key for row in index.groups[group].rows]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 5 s (40 frames at 8 fps, 128x96) and a still."""
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "long.mp4", frames=40)
    write_still(folder / "still.png")
    return folder


def test_a_row_comes_back_as_the_item_that_it_was(media: Path) -> None:
    row = {
        "path": "long.mp4",
        "captions": ["A bar moves.", "Stripes."],
        "caption_weights": [3, 1],
        "start": 1.0,
        "end": 4.0,
        "crop": [16, 0, 96, 96],
        "fps": 16,
        "weight": 2,
    }
    index = build_index([write_table(media, [row])], config())
    item, info = index.item(0)
    assert item == Item(
        path=str(media / "long.mp4"),
        key="long.mp4",
        captions=("A bar moves.", "Stripes."),
        caption_weights=(3.0, 1.0),
        start=1.0,
        end=4.0,
        crop=(16, 0, 96, 96),
        fps=16.0,
        weight=2.0,
    )
    assert (info.width, info.height, info.frames, info.fps, info.duration) == (128, 96, 40, 8.0, 5.0)


def test_the_part_decides_on_the_bucket_not_the_file(media: Path) -> None:
    rows = [
        {"path": "long.mp4", "caption": "all of it"},
        {"path": "long.mp4", "caption": "half a second", "start": 1.0, "end": 1.5},
        {"path": "long.mp4", "caption": "upright", "crop": [0, 0, 48, 96]},
    ]
    sizes = {"sizes": [[64, 64], [96, 48]], "frames": [1, 9]}
    index = build_index([write_table(media, rows)], config(buckets=sizes))
    where = {index.item(int(row))[0].captions[0]: g.bucket for g in index.groups for row in g.rows}
    upright = Bucket(frames=9, height=96, width=48)
    assert where == {"all of it": CLIP, "half a second": STILL, "upright": upright}


def test_a_part_outside_its_file_is_bad_and_its_file_is_not(media: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"path": "long.mp4", "caption": "late", "start": 7.0},
        {"path": "long.mp4", "caption": "wide", "crop": [64, 0, 96, 96]},
        {"path": "long.mp4", "caption": "right"},
    ]
    with caplog.at_level(logging.WARNING):
        index = build_index([write_table(media, rows)], config())
    path = str(media / "long.mp4")
    assert index.bad == (
        (path, "its part from 7 s to its end is outside its 5.000 s; fix start and end"),
        (
            path,
            "its crop [64, 0, 96, 96] (left, top, width, height) is outside its 128x96 pixels; fix the crop",
        ),
    )
    assert index.table.num_rows == 1
    assert f"left out, fix or remove it: {path}: its part from 7 s" in caplog.text
    with pytest.raises(DataError, match=r"^2 files cannot be read, more than .*skip \(1\) allows: .*long\.mp4 \("):
        build_index([write_table(media, rows)], config(on_bad_sample={"skip": 1}))


def test_all_windows_makes_one_record_of_each(media: Path) -> None:
    write_table(media, [{"path": "long.mp4", "caption": "c"}, {"path": "still.png", "caption": "s"}])
    source = SourceConfig(path=str(media / "rows.jsonl"), sampler="all_windows")
    index = build_index([source], config())
    still, clip = index.groups
    assert (still.bucket, clip.bucket) == (STILL, CLIP)
    assert still.windows is None
    assert clip.windows is not None
    assert clip.rows.dtype == np.uint32
    assert clip.windows.dtype == np.uint16
    assert clip.rows.tolist() == [0, 0, 0, 0]  # 40 frames hold 9 four times
    assert clip.windows.tolist() == [0, 1, 2, 3]
    assert index.shares == {"rows": 5.0}
    assert index.summary() == "5 records (rows 1x64x64: 1, rows 9x64x64: 4); 0 unreadable, 0 in no bucket"


def test_weights_repeat_rows_and_their_windows(media: Path) -> None:
    rows = [
        {"path": "long.mp4", "caption": "once", "weight": 0.5},
        {"path": "long.mp4", "caption": "twice", "weight": 1.0, "end": 2.5},
    ]
    write_table(media, rows)
    source = SourceConfig(path=str(media / "rows.jsonl"), sampler="all_windows")
    (clip,) = build_index([source], config()).groups
    assert clip.windows is not None
    records = list(zip(clip.rows.tolist(), clip.windows.tolist()))
    assert records == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("weights", "visits"),
    [
        ([1.0, 1.0], [1, 1]),
        ([0.25, 0.5], [1, 2]),
        ([1.0, 1.5, 4.0], [2, 3, 8]),
        ([1.0, 1.04], [1, 1]),  # 4 % is within what weights are rounded by
        ([3.0, 1.0, 2.0], [3, 1, 2]),
        ([1.0, 1 / 3], [3, 1]),
    ],
)
def test_weights_become_the_smallest_whole_numbers(weights: list[float], visits: list[int]) -> None:
    assert visits_by_weight(np.array(weights)).tolist() == visits


def test_no_visits_miss_their_weight_by_more_than_five_percent() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.uniform(0.1, 5.0, rng.integers(1, 8))
        visits = visits_by_weight(weights)
        ratios = visits / weights
        assert visits.min() >= 1
        assert ratios.max() / ratios.min() <= 1.05 / 0.95


def test_weights_too_far_apart_are_refused(media: Path) -> None:
    rows = [
        {"path": "still.png", "caption": "rare", "weight": 0.001},
        {"path": "still.png", "caption": "common", "weight": 5},
    ]
    message = (
        r"^source 'rows': its weights reach from 0\.001 to 5, so that a record would come 5000 times in an epoch "
        r"\(at most 1000\); bring them closer together, or make two sources of it and give them shares\.$"
    )
    with pytest.raises(DataError, match=message):
        build_index([write_table(media, rows)], config())
    rows[0]["weight"] = 1e-308
    with pytest.raises(DataError, match="its weights reach from 1e-308 to 5, so that .* times in an epoch"):
        build_index([write_table(media, rows)], config())


def test_a_weight_of_zero_leaves_the_record_out(media: Path) -> None:
    rows = [{"path": "still.png", "caption": "never", "weight": 0}, {"path": "long.mp4", "caption": "c"}]
    index = build_index([write_table(media, rows)], config())
    assert index.dropped == [(str(media / "still.png"), "its weight is 0")]
    assert keys(index) == ["long.mp4"]


def test_the_order_is_that_of_the_source_however_files_lie_and_threads_run(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in (3, 10, 1, 2, 30, 22, 4)]
    for name in names:
        write_still(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a still")
    runs = [build_index([SourceConfig(path=str(tmp_path))], config()) for _ in range(2)]  # probed, then known
    assert keys(runs[0]) == ["1.png", "2.png", "3.png", "4.png", "10.png", "22.png", "30.png"]
    assert runs[0].table.equals(runs[1].table)


def test_groups_come_by_source_and_bucket(media: Path) -> None:
    write_table(media, [{"path": "long.mp4", "caption": "c"}, {"path": "still.png", "caption": "s"}])
    table = str(media / "rows.jsonl")
    sources = [SourceConfig(path=table, name="z"), SourceConfig(path=table, name="a", sampler="first_frame")]
    index = build_index(sources, config())
    assert [(g.source, g.bucket, g.rows.tolist()) for g in index.groups] == [
        ("z", STILL, [1]),
        ("z", CLIP, [0]),
        ("a", STILL, [2, 3]),
    ]
    assert index.table.column("source").to_pylist() == ["z", "z", "a", "a"]


def test_a_bad_file_of_two_sources_counts_once(media: Path, tmp_path: Path) -> None:
    write_still(tmp_path / "good.png").with_suffix(".txt").write_text("fine")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.txt").write_text("broken")
    sources = [SourceConfig(path=str(tmp_path), name=n) for n in ("a", "b")]
    index = build_index(sources, config())
    assert index.bad == ((str(tmp_path / "broken.png"), "not a readable image: unknown format"),)


def test_a_source_without_a_usable_record_is_named(media: Path) -> None:
    source = write_table(media, [{"path": "still.png", "caption": "s"}])
    message = (
        r"^source 'rows' \(.*rows\.jsonl\): not one record can be used: .*still\.png \(a still, but no bucket has "
        r"1 frame\); fix the files, or change data\.params\.buckets\.$"
    )
    with pytest.raises(DataError, match=message):
        build_index([source], config(buckets={"frames": [9]}))


def test_a_name_that_is_not_utf8_is_refused() -> None:
    items = [Item(path="clips/caf\udce9.mp4", key="k", captions=("c",))]
    with pytest.raises(DataError, match=r"^'clips/caf.udce9\.mp4': not valid UTF-8; rename the file, or fix its"):
        list(item_batches(items))


def test_clips_are_counted_by_the_length_they_are_trained_at(media: Path) -> None:
    rows = [{"path": "long.mp4", "caption": "", "start": s, "end": 5.0} for s in (0.0, 0.5, 3.0, 4.8)]
    source = write_table(media, [*rows, {"path": "still.png", "caption": ""}])
    stills = SourceConfig(path=source.path, sampler="random_frame", name="stills")
    assert clip_lengths(build_index([source, stills], config(max_num_frames=49))) == {
        41: 1,
        33: 1,
        17: 1,
        1: 1,
        0: 0,
    }
    short = build_index([source], config(buckets={"frames": [1, 33]}, short_clips="drop"))
    assert clip_lengths(short) == {33: 2, 0: 2, 1: 0}


@pytest.mark.parametrize(
    ("clips", "start", "remedy"),
    [
        ({49: 2, 33: 8}, None, None),
        ({1: 0}, None, None),
        ({}, None, None),
        ({33: 5, 1: 4, 0: 1}, "none of the 10 clips is long enough", "or set data.params.max_num_frames to 33"),
        ({49: 1, 41: 1, 17: 8}, "only 1 of the 10 clips are long enough", "max_num_frames to 41"),
        ({1: 3}, "none of the 3 clips is long enough", "give data.params.buckets.frames shorter lengths"),
    ],
)
def test_a_longest_bucket_that_is_nearly_empty_is_named(
    clips: dict[int, int], start: str | None, remedy: str | None
) -> None:
    found = longest_is_rare(clips, config(max_num_frames=49))
    if start is None:
        assert found is None
    else:
        assert found is not None and found[0].startswith(start) and found[1].endswith(str(remedy))


def test_files_of_endings_that_are_not_read_stand_in_the_summary(tmp_path: Path) -> None:
    for name in ("a.png", "b.jxl", "c.jxl"):
        write_still(tmp_path / "a.png") if name == "a.png" else (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text("")
    index = build_index([SourceConfig(path=str(tmp_path))], config())
    assert index.unread == {".jxl": 2}
    assert index.summary().endswith("; 0 unreadable, 0 in no bucket, 2 of endings that are not read (.jxl)")


def test_an_index_crosses_process_boundaries(media: Path) -> None:
    index = build_index([write_table(media, [{"path": "still.png", "caption": "s"}])], config())
    again = pickle.loads(pickle.dumps(index))
    assert again.item(0) == index.item(0)
    assert os.fspath(media / "still.png") == again.item(0)[0].path
