"""No file crashes or hangs a reader: 300 broken ones (10,000 by `python -m tests.fuzz`), and bombs by hand."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sat_ext.data.guard import Guard
from sat_ext.errors import MediaError, SatExtError
from tests.fuzz import examine, fuzz, mutated, write_originals
from tests.media import pattern, write_clip

FILES = 300


def test_broken_files_of_every_format_are_read_or_refused(tmp_path: Path) -> None:
    found = fuzz(tmp_path, files=FILES, seed=0)
    assert not found.troubles
    assert sum(sum(counts.values()) for counts in found.outcomes.values()) == FILES
    for outcome in ("read", "refused"):
        assert sum(counts[outcome] for counts in found.outcomes.values()) > FILES / 10


def test_the_intact_files_are_read(tmp_path: Path) -> None:
    with Guard(examine, timeout=20) as guard:
        for path in write_originals(tmp_path).values():
            guard(str(path))


def test_a_seed_and_a_number_name_a_broken_file() -> None:
    data = bytes(range(256)) * 8
    copies = [mutated(data, np.random.default_rng([0, n])) for n in range(50)]
    assert copies == [mutated(data, np.random.default_rng([0, n])) for n in range(50)]
    assert len(set(copies)) > 45
    assert mutated(b"", np.random.default_rng(0)) == b""


# --- files that ask for far more than they hold ---


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = bytes(1000)) -> bytes:
    """An RGB PNG whose header declares that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def text_chunks(count: int, size: int) -> bytes:
    texts = [(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(size))) for n in range(count)]
    return png(16, 16, *texts)


def clip_of(folder: Path, suffix: str, codec: str, pixels: str) -> bytes:
    return write_clip(folder / f"clip{suffix}", 3, size=(480, 640), codec=codec, pixel_format=pixels).read_bytes()


def matroska(folder: Path, declared: int) -> bytes:
    """FFV1, whose size is the container's, in the elements PixelWidth (B0) and PixelHeight (BA) of two bytes."""
    data, side = clip_of(folder, ".mkv", "ffv1", "yuv420p"), struct.pack(">H", declared)
    assert b"\xb0\x82\x02\x80" in data and b"\xba\x82\x01\xe0" in data
    return data.replace(b"\xb0\x82\x02\x80", b"\xb0\x82" + side).replace(b"\xba\x82\x01\xe0", b"\xba\x82" + side)


def raw_avi(folder: Path, declared: int) -> bytes:
    """A bitmap header that declares another size than the frames have."""
    data = clip_of(folder, ".avi", "rawvideo", "yuv420p")
    assert struct.pack("<ii", 640, 480) in data
    return data.replace(struct.pack("<ii", 640, 480), struct.pack("<ii", declared, declared))


def mjpeg(folder: Path, declared: int) -> bytes:
    """A decent container, but every frame declares another size."""
    data = clip_of(folder, ".avi", "mjpeg", "yuvj420p")
    assert data.count(struct.pack(">HH", 480, 640)) == 3
    return data.replace(struct.pack(">HH", 480, 640), struct.pack(">HH", declared, declared))


def gif(frames: int, declared: int) -> bytes:
    out = io.BytesIO()
    stills = [Image.fromarray(np.full((2, 2), n % 250, np.uint8)) for n in range(frames)]
    stills[0].save(out, "GIF", save_all=True, append_images=stills[1:], duration=100)
    data = bytearray(out.getvalue())
    data[6:10] = struct.pack("<HH", declared, declared)
    return bytes(data)


def jpeg(declared: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pattern(1, 480, 640)).save(out, "JPEG")
    return out.getvalue().replace(struct.pack(">HH", 480, 640), struct.pack(">HH", declared, declared))


LIMIT = "limit|Invalid data found|Invalid argument"
BOMBS: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "png_60000": (".png", lambda _: png(60_000, 60_000), "60000x60000|limit of"),
    "png_text": (".png", lambda _: text_chunks(1, 200 << 20), "too large"),
    "png_many_texts": (".png", lambda _: text_chunks(100, 1 << 20), "Too much memory"),
    "png_profile": (
        ".png",
        lambda _: png(16, 16, (b"iCCP", b"k\0\0" + zlib.compress(bytes(200 << 20)))),
        "too large",
    ),
    "jpeg_60000": (".jpg", lambda _: jpeg(60_000), "limit"),
    "gif_60000": (".gif", lambda _: gif(3, 60_000), "limit"),
    "gif_frames": (
        ".gif",
        lambda _: gif(1200, 4_000),
        "1200 frames of 4000x4000, over the limit of 17179869184 pixels",
    ),
    "mkv_30000": (".mkv", lambda folder: matroska(folder, 30_000), LIMIT),
    "mkv_16000": (".mkv", lambda folder: matroska(folder, 16_000), LIMIT),
    "avi_raw_30000": (".avi", lambda folder: raw_avi(folder, 30_000), LIMIT),
    "avi_mjpeg_16000": (".avi", lambda folder: mjpeg(folder, 16_000), LIMIT),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_a_header_declares_is_refused_before_it_is_allocated(tmp_path: Path, name: str) -> None:
    suffix, make, reason = BOMBS[name]
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(make(tmp_path))
    # so little that a larger allocation would be the reason
    with Guard(examine, timeout=20, memory=100 << 20) as guard, pytest.raises(SatExtError, match=reason) as caught:
        guard(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_still_within_the_limit_may_not_take_more_memory_than_a_file_may(tmp_path: Path) -> None:
    path = tmp_path / "flat.tif"
    Image.new("L", (9000, 9000)).save(path, compression="tiff_adobe_deflate")
    assert path.stat().st_size < 1e6
    with Guard(examine, timeout=20, memory=200 << 20) as guard, pytest.raises(MediaError, match="[Mm]emory"):
        guard(str(path))
    with Guard(examine, timeout=20) as guard:
        guard(str(path))


def test_a_parquet_cell_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    cells = [{"bytes": bytes(120 << 20), "path": "a.jpg"}]
    pq.write_table(pa.table({"image": cells, "text": ["a shape"]}), path, compression="zstd")
    assert path.stat().st_size < 1e6
    with Guard(examine, timeout=20, memory=64 << 20) as guard, pytest.raises(SatExtError) as caught:
        guard(str(path))
    assert str(path) in str(caught.value)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "clip.mp4"
    os.mkfifo(pipe)
    with Guard(examine, timeout=20) as guard, pytest.raises(MediaError, match="not a regular file|no such file"):
        guard(str(pipe))
