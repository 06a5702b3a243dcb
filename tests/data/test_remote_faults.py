"""Servers and lines that fail for a while: nothing is lost. Those that fail for good: one clear sentence."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from sat_ext.config import load
from sat_ext.data.buckets import StepSize
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig, read_source
from sat_ext.data.stream import JointStream
from sat_ext.errors import DataError, MediaError
from sat_ext.files import fingerprint, open_ahead, open_binary
from tests.media import write_clip
from tests.servers import Served, http_server, s3_server

DATA = os.urandom(300_000)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(DATA)
    with http_server(tmp_path) as served:
        yield served


def url_of(server: Served, protocol: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder `set`, also as a bucket, of which the server can do what reading a file takes."""
    if protocol == "http":
        return f"{server.url}/set"
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3fs.S3FileSystem.clear_instance_cache()
    return "s3://set"


def read(url: str) -> bytes:
    with open_binary(url) as file:
        return file.read()


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_what_fails_for_a_while_is_asked_again(server: Served, protocol: str, monkeypatch) -> None:
    url = f"{url_of(server, protocol, monkeypatch)}/a.bin"
    known = fingerprint(url)
    server.stumbles = 2
    assert fingerprint(url) == known
    server.stumbles = 3
    assert read(url) == DATA
    server.drops = 2
    assert read(url) == DATA
    assert server.stumbles == server.drops == 0


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_a_server_that_is_restarted_is_waited_for(tmp_path: Path, protocol: str, monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(DATA)
    url = url_of(Served(f"http://127.0.0.1:{port}", tmp_path), protocol, monkeypatch)
    with ExitStack() as stack:
        timer = threading.Timer(0.7, lambda: stack.enter_context(http_server(tmp_path, port)))
        timer.start()
        assert read(f"{url}/a.bin") == DATA
        timer.join()


@pytest.mark.parametrize("protocol", ["http", "s3"])
@pytest.mark.timeout(120)
def test_a_server_that_fails_for_good_is_one_clear_sentence(server: Served, protocol: str, monkeypatch) -> None:
    url = f"{url_of(server, protocol, monkeypatch)}/a.bin"
    server.stumbles = 10**6
    for call in (fingerprint, read):
        with pytest.raises(MediaError, match=r"/a\.bin: .*(503|Service Unavailable)") as caught:
            call(url)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_not_waited_for(server: Served, monkeypatch) -> None:
    monkeypatch.setattr("sat_ext.files.ranged.time.sleep", lambda seconds: pytest.fail("it waited"))
    for protocol in ("http", "s3"):
        with pytest.raises(MediaError, match="no such file"):
            read(f"{url_of(server, protocol, monkeypatch)}/none.bin")


def fill(folder: Path) -> str:
    """A table of stills and clips; its name."""
    rows = []
    for number in range(6):
        Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(folder / f"{number}.png")
        rows.append({"path": f"{number}.png", "caption": f"still {number}"})
        write_clip(folder / f"{number}.mp4", frames=12 + number)
        rows.append({"path": f"{number}.mp4", "caption": f"clip {number}"})
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "list.jsonl"


def stream_of(source: str) -> JointStream:
    data = load(DataConfig, {"video_size": [64, 64], "max_num_frames": 9}, "data.params")
    index = build_index([SourceConfig(path=source)], data)
    assert not index.bad
    size = StepSize.of(dict.fromkeys(data.make_buckets(), 2))
    return JointStream(index, data, size=size, world=1, dtype=torch.uint8)


def test_a_run_on_a_poor_line_trains_on_the_same_samples(tmp_path: Path, server: Served) -> None:
    table = fill(tmp_path / "set")
    here, there = (stream_of(f"{root}/set/{table}") for root in (tmp_path, server.url))
    for number, (a, b) in enumerate(
        zip(islice(here.batches(start=0, rank=0), 12), there.batches(start=0, rank=0))
    ):
        server.stumbles, server.drops = number % 3, number % 2
        assert a["txt"] == b["txt"] and torch.equal(a["mp4"], b["mp4"])
    assert there.skipped() == []


def test_the_files_of_the_next_batch_are_opened_meanwhile(tmp_path: Path, server: Served) -> None:
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{number}.png")
        (tmp_path / "set" / f"{number}.txt").write_text("x")
    (tmp_path / "set" / "a.bin").unlink()
    stream = stream_of(f"{server.url}/set")
    server.reset()
    list(islice(stream.batches(start=0, rank=0), 4))
    assert len(server.requests) <= 2 * (4 + 1) * 2  # one for what it is and one for all of it, and a batch ahead


def test_a_file_that_was_opened_ahead_is_taken_once(server: Served) -> None:
    url = f"{server.url}/set/a.bin"
    open_ahead([(url, "")])
    assert fingerprint(url).startswith(str(len(DATA))) and read(url) == DATA
    server.reset()
    assert read(url) == DATA and server.requests.count("HEAD") == 1
    open_ahead([(f"{server.url}/set/none.bin", "")])
    with pytest.raises(MediaError, match="no such file"):
        read(f"{server.url}/set/none.bin")


def test_a_file_on_s3_that_was_replaced_is_noticed_without_asking_for_it(server: Served, monkeypatch) -> None:
    url = f"{url_of(server, 's3', monkeypatch)}/a.bin"
    known = fingerprint(url)
    server.reset()
    open_ahead([(url, known)])
    assert fingerprint(url) == known and read(url) == DATA and "HEAD" not in server.requests
    (server.root / "set" / "a.bin").write_bytes(DATA[:-1])  # the server's tag is the size
    open_ahead([(url, known)])
    with pytest.raises(MediaError, match="replaced since it was indexed"):
        fingerprint(url)


def test_a_listing_that_tells_times_more_exactly_than_head_changes_no_file(monkeypatch) -> None:
    """MinIO and Ceph list milliseconds."""
    with s3_server(monkeypatch) as url:
        fs = fsspec.filesystem("s3")
        fs.pipe_file(f"{url}/a/x.png", DATA)
        known = fingerprint(f"{url}/a/x.png")
        fs.find(f"{url}/a")
        (listed,) = fs.dircache[f"{url}/a".removeprefix("s3://")]
        listed["LastModified"] = listed["LastModified"].replace(microsecond=123_000)
        assert fingerprint(f"{url}/a/x.png") == known


def test_captions_and_folders_survive_a_poor_line(tmp_path: Path, server: Served) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("a caption")
    server.stumbles = 2
    (item,) = read_source(f"{server.url}/set")
    assert item.captions == ("a caption",)
    server.stumbles = 10**6
    with pytest.raises(DataError, match=r"/set: .*503.*; check the address and your rights\.$"):
        read_source(f"{server.url}/set")
