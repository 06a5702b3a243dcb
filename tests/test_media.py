from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sat_ext.data.probe import probe
from sat_ext.errors import ConfigError, MediaError
from sat_ext.files.locations import cell_location, member_location
from sat_ext.media import open_image, open_video
from tests.media import indices_of, pattern, read_frames, read_still, real_clip, write_clip
from tests.servers import Served, http_server, s3_server

_FAST = {"crf": "8", "preset": "ultrafast"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with http_server(tmp_path) as served:
        yield served


def in_tar(file: Path) -> str:
    tar = file.with_suffix(".tar")
    with tarfile.open(tar, "w") as archive:
        archive.add(file, f"deep/{file.name}")
    with tarfile.open(tar) as archive:
        member = archive.getmembers()[0]
    return member_location(str(tar), member.name, member.offset_data, member.size)


def in_table(file: Path) -> str:
    table = file.with_suffix(".parquet")
    pq.write_table(pa.table({"video": [b"", file.read_bytes()]}), table)
    return cell_location(str(table), "video", 1, file.suffix)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".mpg", ".flv"])
def test_a_clip_is_the_same_wherever_it_lies(tmp_path, server, suffix):
    codec = {".mpg": "mpeg2video", ".avi": "mpeg4"}.get(suffix, "libx264")
    path = write_clip(tmp_path / f"a{suffix}", frames=30, fps=25, codec=codec)
    fsspec.filesystem("memory").pipe(f"/a{suffix}", path.read_bytes())
    there = [in_tar(path), in_table(path), f"{server.url}/a{suffix}", f"memory://a{suffix}"]
    there.append(in_tar(path).replace(str(tmp_path), server.url))
    info, frames = probe(str(path)), read_frames(str(path), (0.0, 0.5, 1.0))
    for location in there:
        assert probe(location) == info
        assert np.array_equal(read_frames(location, (0.0, 0.5, 1.0)), frames)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".avif", ".tiff"])
def test_a_still_is_the_same_wherever_it_lies(tmp_path, server, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pattern(5)).save(path)
    pixels = read_still(str(path))
    for location in (in_tar(path), in_table(path), f"{server.url}/a{suffix}"):
        assert probe(location) == probe(str(path))
        assert np.array_equal(read_still(location), pixels)


def test_probing_and_a_first_frame_download_a_small_part_of_a_clip(tmp_path, server):
    """1.1 MB, its index at the end, as FFmpeg writes it."""
    shutil.copy(real_clip("bikes.mp4"), tmp_path / "real.mp4")
    long = write_clip(tmp_path / "long.mp4", frames=250, fps=25, size=(480, 720), options=_FAST, gop=50)
    front = write_clip(
        tmp_path / "front.mp4",
        frames=250,
        fps=25,
        size=(480, 720),
        gop=50,
        options=_FAST,
        container_options={"movflags": "faststart"},
    )
    for path, part in ((long, 0.25), (front, 0.25), (tmp_path / "real.mp4", 0.5)):
        whole, url = os.path.getsize(path), f"{server.url}/{path.name}"
        assert whole > 500_000
        server.reset()
        assert probe(url) == probe(str(path))
        assert server.sent < part * whole, (path.name, server.sent, whole)
        server.reset()
        assert np.array_equal(read_frames(url, (0.0,)), read_frames(str(path), (0.0,)))
        assert server.sent < part * whole, (path.name, server.sent, whole)


def test_the_middle_of_a_clip_does_not_download_what_is_before_it(tmp_path, server):
    path = write_clip(tmp_path / "a.mp4", frames=250, fps=25, size=(480, 720), options=_FAST, gop=25)
    server.reset()
    assert indices_of(read_frames(f"{server.url}/a.mp4", (8.0, 8.2))) == [200, 205]
    assert server.sent < 0.5 * os.path.getsize(path)


def test_clips_and_stills_on_s3(tmp_path, monkeypatch):
    pytest.importorskip("moto")
    clip = write_clip(tmp_path / "a.mp4")
    Image.fromarray(pattern(3)).save(tmp_path / "b.png")
    with s3_server(monkeypatch) as url:
        for name in ("a.mp4", "b.png"):
            fsspec.filesystem("s3").put(str(tmp_path / name), f"{url}/{name}")
        assert probe(f"{url}/a.mp4") == probe(str(clip))
        assert indices_of(read_frames(f"{url}/a.mp4", (0.0, 1.0))) == [0, 8]
        assert np.array_equal(read_still(f"{url}/b.png")[0], pattern(3))
        with pytest.raises(MediaError, match="no such file"):
            probe(f"{url}/none.mp4")


def test_a_cut_tar_and_a_dead_server_are_errors_of_the_file(tmp_path, server, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", frames=60)
    location = in_tar(path)
    os.truncate(path.with_suffix(".tar"), 3000)
    for call in (probe, lambda p: read_frames(p, (0.0,))):
        with pytest.raises(MediaError, match="its tar ends after") as caught:
            call(location)
        assert caught.value.path == location
    server.refuses = 100
    with pytest.raises(MediaError, match="503"):
        probe(f"{server.url}/a.mp4")


def test_playlists_open_nothing_else(tmp_path):
    write_clip(tmp_path / "secret.mp4")
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile 'secret.mp4'\n")
    (tmp_path / "b.ts").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "c.avi").write_text("<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>")
    for name in ("a.mp4", "b.ts", "c.avi"):
        with pytest.raises(MediaError, match="not a readable video"), open_video(str(tmp_path / name)):
            pass


def test_errors_of_the_configuration_pass_through():
    for opened in (open_video, open_image):
        with pytest.raises(ConfigError, match="fsspec does not read"), opened("nonsense://a.png"):
            pass
