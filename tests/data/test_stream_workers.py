"""The stream through data workers: the same bytes for any number of them, and files that hang, crash or vanish."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sat_ext.config import load
from sat_ext.data import visits
from sat_ext.data.buckets import StepSize
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.demo_data import write_demo
from sat_ext.errors import ConfigError, DataError

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    write_demo(root / "demo", clips=10, stills=8, held_out=1)
    return root / "demo" / "train"


def make_stream(path: Path, dtype: torch.dtype = torch.uint8, batch: int = 2, **changes: Any) -> JointStream:
    values = {"video_size": [64, 64], "buckets": {"frames": [1, 9]}, "short_clips": "loop", **changes}
    data = load(DataConfig, values, "data.params")
    index = build_index([SourceConfig(path=str(path), sampler="random_start")], data)
    size = StepSize.of(dict.fromkeys(data.make_buckets(), batch))
    return JointStream(index, data, size=size, world=1, dtype=dtype)


class Batches(IterableDataset):  # type: ignore[type-arg]
    """As SAT's loader sees the stream."""

    def __init__(self, stream: JointStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return self.stream.batches(start=0, rank=0, worker=worker, workers=workers)


def load_batches(stream: JointStream, workers: int, count: int) -> list[Batch]:
    batches = islice(DataLoader(Batches(stream), batch_size=None, num_workers=workers), count)
    return [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == b[name].dtype
                assert torch.equal(value, b[name]), name
            else:
                assert value == b[name], name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_the_number_of_workers_changes_no_byte(demo: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Stills and clips, random starts, and one file of each that broke after it was indexed."""
    folder = tmp_path / "data"
    copy_tree(demo, folder)
    stream = make_stream(folder, dtype)
    rows = [int(group.rows[0]) for group in stream.index.groups]
    for row in rows:
        Path(stream.index.item(row)[0].path).write_bytes(b"broken")
    keys = {stream.index.item(row)[0].key for row in rows}
    runs = []
    for workers in (0, 1, 4):
        fresh = JointStream(stream.index, stream.config, size=stream.size, world=1, dtype=dtype)
        runs.append(load_batches(fresh, workers, 16))
        # found by whichever worker, known to this process
        assert all(row in fresh._faults for row in rows) and len(fresh._faults.known) == len(rows)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert {b["kind"][0] for b in runs[0]} == {"image", "video"}
    assert not keys & {key for b in runs[0] for key in b["key"]}


def copy_tree(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def test_uint8_batches_hold_the_pixels_as_they_are_and_are_ones_own(demo: Path) -> None:
    stream = make_stream(demo)
    batches = list(islice(stream.batches(start=0, rank=0), 6))
    copies = [b["mp4"].clone() for b in batches]
    list(islice(stream.batches(start=6, rank=0), 6))  # written over the same shared memory
    floats = islice(make_stream(demo, torch.float32).batches(start=0, rank=0), 6)
    for batch, copy, exact in zip(batches, copies, floats):
        assert batch["mp4"].dtype == torch.uint8
        assert torch.equal(batch["mp4"], copy)
        assert torch.equal(copy.float().div(127.5).sub(1), exact["mp4"])


def test_every_batch_says_what_its_loss_weighs(demo: Path) -> None:
    stream = make_stream(demo, batch=4)
    for batch in islice(stream.batches(start=0, rank=0), 6):
        weight, count = batch["loss_weight"], len(batch["txt"])
        assert weight.dtype == torch.float32
        assert weight.tolist() == pytest.approx([count / stream.schedule.mean_samples] * count)


def test_captions_are_drawn_by_weight_and_change_no_other_draw(demo: Path) -> None:
    stream = make_stream(demo / "videos")
    plain = list(islice(stream.batches(start=0, rank=0), 60))
    table = stream.index.table
    captions, weights = [["often", "never", "sometimes"]] * table.num_rows, [[3.0, 0.0, 1.0]] * table.num_rows
    for name, values in (("captions", captions), ("caption_weights", weights)):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    index = replace(stream.index, table=table)
    drawn = JointStream(index, stream.config, size=stream.size, world=1, dtype=torch.uint8)
    batches = list(islice(drawn.batches(start=0, rank=0), 60))
    texts = [t for b in batches for t in b["txt"]]
    assert set(texts) == {"often", "sometimes"}
    assert 0.6 < texts.count("often") / len(texts) < 0.9
    for a, b in zip(plain, batches):
        assert torch.equal(a["mp4"], b["mp4"])


def test_a_file_that_hangs_is_given_up_and_replaced(
    demo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = make_stream(demo / "videos")
    victim = next(expected.batches(start=0, rank=0))["key"][0]
    slow_for(monkeypatch, victim, lambda: time.sleep(60))
    stream = make_stream(demo / "videos", on_bad_sample={"timeout": 0.5})
    with caplog.at_level(logging.WARNING):
        batch = next(stream.batches(start=0, rank=0))
    assert victim not in batch["key"]
    assert f"{victim}: reading it took longer than 0.5 s (data.params.on_bad_sample.timeout)" in caplog.text


def test_a_file_that_crashes_its_reader_stops_no_worker(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_stream(demo / "videos")
    victim = next(expected.batches(start=0, rank=0))["key"][0]
    slow_for(monkeypatch, victim, lambda: os.kill(os.getpid(), signal.SIGSEGV))
    stream = make_stream(demo / "videos")
    batches = load_batches(stream, 2, 8)
    assert victim not in {key for b in batches for key in b["key"]}
    assert -1 not in stream._faults  # what the workers found
    (reason,) = [reason for path, reason in stream._faults.known.values()]
    assert reason == "the process that read it was ended by SIGSEGV"


def slow_for(monkeypatch: pytest.MonkeyPatch, key: str, happens: Any) -> None:
    real = visits.read_frames

    def read(path: str, *args: Any, **options: Any) -> Any:
        if path.endswith(key):
            happens()
        return real(path, *args, **options)

    monkeypatch.setattr(visits, "read_frames", read)


def test_a_file_that_vanishes_or_changes_during_the_run_is_replaced(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    copy_tree(demo, folder)
    stream = make_stream(folder / "videos")
    batches = stream.batches(start=0, rank=0)
    gone, changed = next(batches)["key"]
    (folder / "videos" / gone).unlink()
    (folder / "videos" / changed).write_bytes(b"another download is under way")
    later = [key for b in islice(batches, 30) for key in b["key"]]
    assert len(later) == 60
    assert not {gone, changed} & set(later)
    reasons = sorted(reason for _, reason in stream._faults.known.values())
    assert reasons[0] == "no such file" and reasons[1].startswith("replaced since it was indexed")


def test_a_spent_budget_ends_the_loader_with_the_list(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    copy_tree(demo, folder)
    stream = make_stream(folder / "videos", on_bad_sample={"skip": 3})
    for clip in folder.glob("videos/*.mp4"):
        clip.unlink()
    with pytest.raises(
        DataError, match=r"files could not be read.*skip 3.* no such file; fix or remove them: .*mp4"
    ):
        load_batches(stream, 2, 4)


def test_memory_does_not_grow_from_sample_to_sample(demo: Path, tmp_path: Path) -> None:
    """The long one is `benchmarks/soak.py`."""
    folder = tmp_path / "data"
    copy_tree(demo, folder)
    stream = make_stream(folder)
    broken = [stream.index.item(int(group.rows[0]))[0].path for group in stream.index.groups]
    for path in broken:
        Path(path).write_bytes(Path(path).read_bytes()[:2000])
    batches = stream.batches(start=0, rank=0)
    sizes = []
    for _ in range(5):
        list(islice(batches, 25))
        sizes.append(resident_memory(stream))
    assert sizes[-1] - sizes[1] < 16e6, sizes


def resident_memory(stream: JointStream) -> int:
    """Bytes of this process and of its reader."""
    pid = stream.guard.pid
    pages = [int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in (os.getpid(), pid)]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def test_the_time_out_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"data\.params\.on_bad_sample\.timeout: 0\.0 seconds; use more than 0"):
        load(DataConfig, {"video_size": [64, 64], "on_bad_sample": {"timeout": 0.0}}, "data.params")
