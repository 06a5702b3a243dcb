"""Index and stream over real files: what is left out, what is replaced, what ends a run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sat_ext.cogvideox import SequenceShape
from sat_ext.config import load
from sat_ext.data.buckets import StepSize
from sat_ext.data.index import Index, build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.demo_data import write_demo
from sat_ext.errors import ConfigError, DataError
from tests.media import index_of, write_clip
from tests.servers import http_server


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    write_demo(tmp_path / "demo", clips=12, stills=8, held_out=1)
    return tmp_path / "demo" / "train"


def config(**changes: Any) -> DataConfig:
    return load(DataConfig, {"video_size": [64, 64], "max_num_frames": 9, **changes}, "data.params")


def stream_of(index: Index, data: DataConfig, world: int = 1, batch: int = 2) -> JointStream:
    size = StepSize.of(dict.fromkeys(data.make_buckets(), batch))
    return JointStream(index, data, size=size, world=world, dtype=torch.float32)


def test_every_file_lands_in_a_bucket_and_is_read(demo: Path) -> None:
    index = build_index([SourceConfig(path=str(demo))], config())
    assert index.table.num_rows == 20
    assert sum(len(g.rows) for g in index.groups) == 20
    assert not index.bad
    assert not index.dropped
    batches = islice(stream_of(index, config()).batches(start=0, rank=0), 12)
    assert {b["kind"][0] for b in batches} == {"image", "video"}


@pytest.mark.parametrize("rate", [24, 30])
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_clips_of_six_seconds_train_at_49_frames_with_cogvideos_trimming(
    tmp_path: Path, rate: int, decoder: str
) -> None:
    clip = write_clip(tmp_path / "six.mp4", 6 * rate, rate, size=(64, 64))
    write_clip(tmp_path / "long.mp4", 7 * rate, rate, size=(64, 64))
    table = tmp_path / "rows.csv"
    table.write_text("path,caption,start,end\nsix.mp4,a,,\nlong.mp4,b,0.5,6.5\n")
    data = config(max_num_frames=49, skip_frms_num=3, decoder=decoder)
    index = build_index([SourceConfig(path=str(table))], data)
    assert {g.bucket.frames for g in index.groups} == {49}
    batch = next(stream_of(index, data).batches(start=0, rank=0))
    assert batch["num_frames"].tolist() == [49] and batch["fps"].tolist() == [8]
    pixels = ((batch["mp4"][0].permute(0, 2, 3, 1) + 1) * 127.5).numpy()
    seen = [index_of(frame) for frame in pixels]
    first, last = (0, 6 * rate - 1) if batch["txt"] == ["a"] else (rate // 2, rate // 2 + 6 * rate - 1)
    assert len(set(seen)) == 49 and seen == sorted(seen)
    assert first <= seen[0] <= first + 3 and last - 3 <= seen[-1] <= last
    assert clip.exists()


def test_unreadable_files_are_left_out_and_named(demo: Path, caplog: pytest.LogCaptureFixture) -> None:
    still = next(demo.glob("stills/*.png"))
    still.write_bytes(b"")
    clip = next(demo.glob("videos/*.mp4"))
    clip.write_bytes(clip.read_bytes()[:300])
    with caplog.at_level(logging.WARNING):
        index = build_index([SourceConfig(path=str(demo))], config())
    assert {path for path, _ in index.bad} == {str(still), str(clip)}
    assert f"left out, fix or remove it: {still}: the file is empty (0 bytes)" in caplog.text
    assert "2 unreadable" in index.summary()


def test_too_many_unreadable_files_are_an_error_that_lists_them(demo: Path) -> None:
    for still in demo.glob("stills/*.png"):
        still.write_bytes(b"")
    with pytest.raises(
        DataError, match=r"files cannot be read, more than .*skip \(0\) allows: .*\.png \(the file is empty"
    ):
        build_index([SourceConfig(path=str(demo))], config(on_bad_sample={"skip": 0}))


def test_a_source_without_a_bucket_is_an_error(demo: Path) -> None:
    with pytest.raises(
        DataError, match=r"source 'stills' .* not one record can be used: .*a still, but no bucket has 1 frame"
    ):
        build_index([SourceConfig(path=str(demo / "stills"))], config(buckets={"frames": [9]}))


def test_a_file_that_breaks_during_the_run_is_replaced_from_its_bucket(
    demo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = build_index([SourceConfig(path=str(demo / "videos"))], config(buckets={"frames": [9]}))
    stream = stream_of(index, config(buckets={"frames": [9]}))
    before = [b["key"] for b in islice(stream.batches(start=0, rank=0), 6)]
    victim = before[0][0]
    (demo / "videos" / victim).write_bytes(b"gone")
    with caplog.at_level(logging.WARNING):
        after = [b["key"] for b in islice(stream.batches(start=0, rank=0), 6)]
    assert all(victim not in keys for keys in after)
    assert [len(k) for k in after] == [len(k) for k in before]
    for old, new in zip(before, after):
        assert all(b == a for a, b in zip(old, new) if a != victim)  # only the bad one was replaced
    assert caplog.text.count("skipped: ") == 1


@pytest.mark.parametrize("how", ["written over", "same size", "moved there", "of a tar", "behind a url"])
def test_a_file_that_another_replaced_since_it_was_indexed_is_not_trained_on(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Uncompressed stills, of one size in bytes."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(folder / f"{number}.bmp")
        (folder / f"{number}.txt").write_text(str(number))
    aside = Path(shutil.copy2(folder / "3.bmp", tmp_path))
    os.utime(aside, (1, 1))
    source, data = str(folder), config(buckets={"frames": [1]}, on_bad_sample={"skip": 1})
    with ExitStack() as stack:
        if how == "of a tar":
            source = str(tmp_path / "data.tar")
            with tarfile.open(source, "w") as tar:
                tar.add(folder, ".")
        if how == "behind a url":
            (folder / "list.jsonl").write_text(
                "".join(json.dumps({"path": f"{n}.bmp", "caption": str(n)}) + "\n" for n in range(4))
            )
            source = f"{stack.enter_context(http_server(folder)).url}/list.jsonl"
        index = build_index([SourceConfig(path=source)], data)
        stream = stream_of(index, data, batch=1)
        assert len({b["txt"][0] for b in islice(stream.batches(start=0, rank=0), 4)}) == 4
        if how == "moved there":
            os.replace(aside, folder / "0.bmp")
        elif how == "of a tar":
            os.utime(source)
        else:
            larger = 64 if how == "same size" else 80  # the test server tells sizes
            Image.new("RGB", (larger, larger), (9, 9, 9)).save(folder / "0.bmp")
            os.utime(folder / "0.bmp", (time.time() + 5, time.time() + 5))
        if how == "of a tar":
            with pytest.raises(
                DataError, match="2 files could not be read, 2 in a row.*replaced since it was indexed"
            ):
                list(islice(stream.batches(start=0, rank=0), 4))
            return
        captions = [b["txt"][0] for b in islice(stream.batches(start=0, rank=0), 8)]
    assert len(captions) == 8 and "0" not in captions
    assert "0.bmp: replaced since it was indexed; the new file is used from the next start on" in caplog.text


def test_a_copy_of_its_own_on_another_machine_is_the_same_file(demo: Path) -> None:
    index = build_index([SourceConfig(path=str(demo / "stills"))], config())
    for still in demo.glob("stills/*"):
        os.utime(still, (1, 1))
    there = replace(index, made=time.time() + 60)  # indexed after the copy was made
    assert len(list(islice(stream_of(there, config()).batches(start=0, rank=0), 4))) == 4
    with pytest.raises(DataError, match="replaced since it was indexed"):
        list(islice(stream_of(index, config()).batches(start=0, rank=0), 4))


def test_past_the_budget_the_run_stops_with_the_list(demo: Path) -> None:
    data = config(buckets={"frames": [9]}, on_bad_sample={"skip": 2, "consecutive": 20})
    stream = stream_of(build_index([SourceConfig(path=str(demo / "videos"))], data), data)
    for clip in demo.glob("videos/*.mp4"):
        clip.write_bytes(b"gone")
    with pytest.raises(
        DataError, match=r"3 files could not be read.*on_bad_sample allows \(skip 2, consecutive 20\).*\.mp4: "
    ):
        next(stream.batches(start=0, rank=0))


def test_one_bad_file_alone_in_its_bucket_is_named(demo: Path) -> None:
    data = config(buckets={"frames": [9]}, short_clips="loop")
    other = demo.parent / "alone"
    other.mkdir()
    clip = next(demo.glob("videos/*.mp4"))
    (other / "a.mp4").write_bytes(clip.read_bytes())
    (other / "a.txt").write_text("a shape")
    index = build_index([SourceConfig(path=str(other))], data)
    (other / "a.mp4").write_bytes(b"gone")
    with pytest.raises(DataError, match=r"source 'alone': no file of bucket 9x64x64 can be read, .*fix or remove"):
        next(stream_of(index, data).batches(start=0, rank=0))


def test_shares_and_records_hold_over_ranks_and_workers(demo: Path) -> None:
    data = config(buckets={"frames": [1, 9]}, short_clips="drop")
    sources = [
        SourceConfig(name="clips", path=str(demo / "videos"), share=0.5),
        SourceConfig(name="stills", path=str(demo / "stills"), share=0.5),
    ]
    stream = stream_of(build_index(sources, data), data, world=2, batch=1)
    ranks = [list(islice(stream.batches(start=0, rank=r), 24)) for r in (0, 1)]
    for a, b in zip(*ranks):
        assert a["mp4"].shape == b["mp4"].shape
        assert a["source"] == b["source"]
        assert not set(a["key"]) & set(b["key"])
    counts = Counter(s for rank in ranks for batch in rank for s in batch["source"])
    assert abs(counts["clips"] - counts["stills"]) <= 2
    workers = [list(islice(stream.batches(start=0, rank=0, worker=w, workers=2), 12)) for w in (0, 1)]
    merged = [b["key"] for pair in zip(*workers) for b in pair]
    assert merged == [b["key"] for b in ranks[0]]


def test_short_clips_are_filled_and_counted_truly(demo: Path) -> None:
    for policy in ("loop", "pad_last"):
        data = config(buckets={"frames": [9]}, short_clips=policy)
        index = build_index([SourceConfig(path=str(demo / "videos"))], data)
        assert index.table.num_rows == 12
        batches = islice(stream_of(index, data, batch=1).batches(start=0, rank=0), 12)
        frames = [int(n) for b in batches for n in b["num_frames"]]
        assert min(frames) < 9 == max(frames)


def test_decord_and_pyav_give_the_same_batches(demo: Path) -> None:
    batches = []
    for decoder in ("pyav", "decord"):
        data = config(decoder=decoder)
        index = build_index([SourceConfig(path=str(demo / "videos"))], data)
        batches.append(list(islice(stream_of(index, data).batches(start=0, rank=0), 4)))
    for a, b in zip(*batches):
        np.testing.assert_array_equal(a["mp4"], b["mp4"])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [{"path": "a/clips"}, {"path": "b/clips"}],
            r"two sources are called 'clips' \(a/clips and b/clips\); give each",
        ),
        (
            [{"path": "a", "share": 1}, {"path": "b"}],
            "'b' has no share but others have; give every source a share",
        ),
    ],
)
def test_sources_that_cannot_be_told_apart_or_mixed_are_refused(
    sources: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(sources=sources)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {9: 0}}, r"data\.params\.batch: .* write \{cost: auto\}"),
        ({"batch": {"cost": "free"}}, r"data\.params\.batch"),
        ({"fps": 0}, r"data\.params\.fps: 0 frames a second; use 1 or more"),
        ({"decoder": "decor"}, r"data\.params\.decoder: 'decor' is not one of .*did you mean 'decord'"),
        (
            {"buckets": {"sizes": {"aera": 4096}}},
            r"data\.params\.buckets\.sizes: unknown key 'aera'; did you mean 'area'",
        ),
    ],
)
def test_values_that_cannot_be_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_bucket_without_a_batch_size_is_named() -> None:
    data = config(batch={1: 4})
    with pytest.raises(ConfigError, match="no size for the buckets of 9 frames; add '9: 1'"):
        data.step_size(data.make_buckets(), largest=1, shape=SequenceShape(), packs=False)


def test_sizes_by_area_are_read_from_yaml() -> None:
    data = load(DataConfig, {"buckets": {"frames": [1], "sizes": {"area": 4096, "ratios": [1.0]}}}, "data.params")
    assert [str(b) for b in data.make_buckets()] == ["1x64x64"]


@pytest.mark.parametrize(
    ("share", "accumulation", "batches", "mixed"),
    [(0.5, 4, {3, 1}, 1.0), (0.3, 4, {1}, 1.0), (0.5, 12, {8, 1}, 1.0), (0.1, 4, {1}, 0.4), (0.5, 1, {8, 1}, 0.0)],
)
def test_updates_of_steps_of_one_bucket_hold_every_source(
    demo: Path, share: float, accumulation: int, batches: set[int], mixed: float
) -> None:
    parts = {"stills": share, "videos": 1 - share}
    sources = [SourceConfig(path=str(demo / name), share=part) for name, part in parts.items()]
    data = config(short_clips="loop", buckets={"frames": [1, 9]})
    index = build_index(sources, data)
    size = StepSize.of({b: 8 if b.frames == 1 else 1 for b in data.make_buckets()})
    many = replace(index, groups=tuple(replace(g, rows=np.resize(g.rows, 1000)) for g in index.groups))
    stream = JointStream(many, data, size=size, world=1, dtype=torch.float32, accumulation=accumulation)
    assert {c.batch for c in stream.schedule.cells} == batches
    assert stream.mixed_updates() == pytest.approx(mixed, abs=0.01)
