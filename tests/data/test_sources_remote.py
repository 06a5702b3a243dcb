from __future__ import annotations

import json
import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import av
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sat_ext.data.probe import probe
from sat_ext.data.sources import read_source
from sat_ext.data.sources.reach import Reach, resolve
from sat_ext.errors import ConfigError, DataError
from sat_ext.files import open_binary
from sat_ext.types import Item
from tests.media import pattern, read_still, write_clip
from tests.servers import Served, http_server, s3_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with http_server(tmp_path) as served:
        yield served


def fill(folder: Path) -> None:
    """One data set of each kind, each in a folder."""
    for kind in ("side", "cog/videos", "cog/labels", "shards", "data"):
        (folder / kind).mkdir(parents=True)
    clip = write_clip(folder / "side" / "clip.mp4").read_bytes()
    (folder / "side" / "clip.txt").write_text("a clip")
    (folder / "side" / "deep").mkdir()
    Image.fromarray(pattern(3)).save(folder / "side" / "deep" / "still 1.png")
    (folder / "side" / "deep" / "still 1.txt").write_text("a still")
    (folder / "cog" / "videos" / "1.mp4").write_bytes(clip)
    (folder / "cog" / "labels" / "1.txt").write_text("by label")
    rows = [
        {"path": "side/deep/still 1.png", "caption": "a still"},
        {"path": "side/clip.mp4", "caption": "a clip"},
    ]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "t.csv").write_text("path,caption\nside/clip.mp4,a clip\n")
    for n in range(2):
        with tarfile.open(folder / "shards" / f"{n}.tar", "w") as tar:
            for name in ("clip.mp4", "clip.txt"):
                tar.add(folder / "side" / name, name)
    (folder / "shards" / "1.meta.jsonl").write_text('{"key": "clip", "caption": "from meta"}')
    pq.write_table(pa.table({"video": [clip], "text": ["in a cell"]}), folder / "data" / "train-0.parquet")


KINDS = ["side", "cog", "cog/videos", "t.jsonl", "t.csv", "shards", "shards/{0..1}.tar", "shards/0.tar", "data"]


def check_same(folder: Path, url: str, kind: str) -> None:
    """The items are those of the local folder, and their files can be read."""
    local, items = read_source(f"{folder}/{kind}"), read_source(f"{url}/{kind}")

    def seen(item: Item) -> tuple[str, tuple[str, ...]]:
        return item.key.replace("%20", " "), item.captions

    assert [seen(i) for i in items] == [seen(i) for i in local]
    for here, there in zip(local, items, strict=True):
        assert there.path.startswith(url) and probe(there.path) == probe(here.path)


def noisy_clip(path: Path, codec: str, frames: int = 250) -> int:
    """Some megabytes of 25 frames a second, with sound between them; how many bytes."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 256, 256, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.bit_rate = 12, 8_000_000
        sound = container.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        for number in range(frames):
            noise = rng.integers(0, 256, (256, 256, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), format="s16", layout="mono")
            silence.sample_rate, silence.pts = 8000, 320 * number
            container.mux(sound.encode(silence))
        container.mux([*stream.encode(None), *sound.encode(None)])
    return path.stat().st_size


@pytest.mark.parametrize("kind", ["mkv libx264", "mkv mpeg4", "avi mpeg4", "mov libx264"])
def test_a_remote_clip_is_probed_without_its_middle(tmp_path, server, kind):
    suffix, codec = kind.split()
    size = noisy_clip(tmp_path / f"a.{suffix}", codec)
    here, there = probe(f"{tmp_path}/a.{suffix}"), probe(f"{server.url}/a.{suffix}")
    assert there.frames == here.frames == 250
    assert (there.fps, there.duration) == (pytest.approx(25), pytest.approx(10))
    assert (there.width, there.height, there.codec) == (here.width, here.height, here.codec)
    assert server.sent < 0.4 * size, (server.sent, size)


def test_a_remote_clip_of_a_varying_rate_is_still_counted(tmp_path, server):
    starts = [n / 25 + 0.015 * (n % 3) for n in range(60)]
    write_clip(tmp_path / "a.mkv", 60, 25, starts=starts)
    assert probe(f"{server.url}/a.mkv") == probe(f"{tmp_path}/a.mkv")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_may_lie_behind_http(tmp_path, server, kind):
    fill(tmp_path)
    check_same(tmp_path, server.url, kind)


def test_every_kind_of_source_may_lie_on_s3(tmp_path, monkeypatch):
    fill(tmp_path)
    with s3_server(monkeypatch) as url:
        fsspec.filesystem("s3").put(f"{tmp_path}/", f"{url}/set", recursive=True)
        for kind in KINDS:
            check_same(tmp_path, f"{url}/set", kind)
        still = next(i for i in read_source(f"{url}/set/side") if i.path.endswith(".png"))
        assert np.array_equal(read_still(still.path)[0], pattern(3))
        for path in ("none", "none.jsonl", "none.tar", "{0..1}.tar"):
            with pytest.raises(DataError, match="no such file"):
                read_source(f"{url}/{path}")


def test_shards_are_listed_without_their_media(tmp_path, server):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n in range(4):
            (tmp_path / f"{n}.mp4").write_bytes(os.urandom(1 << 20))
            (tmp_path / f"{n}.txt").write_text("x")
            for suffix in (".mp4", ".txt"):
                tar.add(tmp_path / f"{n}{suffix}", f"{n}{suffix}")
    server.reset()
    assert len(read_source(f"{server.url}/0.tar")) == 4
    assert server.sent < 400_000


def test_a_table_behind_a_url_may_not_name_local_files(tmp_path, server):
    (tmp_path / "t.jsonl").write_text('{"path": "/etc/passwd.png", "caption": "x"}')
    with pytest.raises(
        DataError, match=r"line 1: '/etc/passwd\.png' is a local path in a table behind a URL; write"
    ):
        read_source(f"{server.url}/t.jsonl")


def test_a_source_that_is_not_there_says_so(server):
    for path in ("none", "none.jsonl", "none.csv", "none.parquet", "none.tar", "{0..1}.tar"):
        with pytest.raises(DataError, match="no such file"):
            read_source(f"{server.url}/{path}")
    with pytest.raises(ConfigError, match="fsspec does not read nonsense:// URLs"):
        read_source("nonsense://data/set")


def test_names_that_mean_something_to_fsspec_are_names_on_s3(tmp_path, monkeypatch):
    names = ("clip [HD]", "a*b", "q?x", "x::y", "100%", "per%20cent", "hash#tag", "{br}")
    with s3_server(monkeypatch) as url:
        fs = fsspec.filesystem("s3")
        for name in names:
            fs.pipe_file(f"{url}/odd [1]/{name}.png", name.encode())
            fs.pipe_file(f"{url}/odd [1]/{name}.txt", f"caption of {name}".encode())
        items = read_source(f"{url}/odd [1]")
        assert {i.key: i.captions for i in items} == {f"{n}.png": (f"caption of {n}",) for n in names}
        for item in items:
            with open_binary(item.path) as file:
                assert file.read().decode() == item.key.removesuffix(".png")


@pytest.mark.parametrize(
    ("base", "file", "found"),
    [
        ("s3://b/meta", "./a.mp4", "s3://b/meta/a.mp4"),
        ("s3://b/meta", "../clips/x [1].mp4", "s3://b/clips/x [1].mp4"),
        ("s3://b/meta", "../../../a.mp4", "s3://b/a.mp4"),
        ("https://h/meta", "../clips/a b.mp4", "https://h/clips/a%20b.mp4"),
    ],
)
def test_dots_in_a_table_behind_a_url_mean_folders(base, file, found):
    assert resolve(base, file, "line 1", Reach()) == found


def test_a_server_that_is_not_there_is_distinguished_from_an_empty_folder():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/data"
    with pytest.raises(DataError, match=r"/data: cannot be read: Cannot connect .*; check the address"):
        read_source(url)


def test_a_file_system_that_cannot_start_is_one_sentence(monkeypatch):
    def fail(url: str, **options: object) -> None:
        raise OSError("Unable to load libjvm\ndlopen(a) failed\ndlopen(b) failed")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(
        ConfigError, match=r"hdfs:// cannot be read \(Unable to load libjvm\); check its settings\.$"
    ):
        read_source("hdfs://data/set")
