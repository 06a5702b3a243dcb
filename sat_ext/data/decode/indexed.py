"""Clips by decord, which SAT's users know, and by torchcodec: decoders that address frames by number.

Files that these misread go to PyAV. Both choose another of several video streams, and seek to frames that intra
refresh marks as key frames. decord also counts the frames that an edit list hides, seeks past the mark in
transport streams, has no times in AVI, turns mirrored videos upside down, and loses frames where a group begins
with some that refer to the one before it (open GOPs, x265's default). PyAV also reads remote files, non-square
pixels, alpha, interlaced frames, and all but 8-bit 4:2:0 in sRGB's colours, which these convert less exactly.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import av
import numpy as np
from av.video.stream import VideoStream

from sat_ext.data.decode.pick import Picked
from sat_ext.data.decode.pyav import read_pyav, starts_at
from sat_ext.data.decode.rgb import conversion_of, display_matrix, is_inexact, is_interlaced
from sat_ext.data.transform import Fit
from sat_ext.errors import ConfigError, MediaError
from sat_ext.files import is_local
from sat_ext.media import decoder_of, displayed_size, open_video
from sat_ext.types import TIME_TOLERANCE

_AT_ONCE = 8  # frames fetched together, at full size

# (absolute path, frames in the file, their wanted numbers, ascending) -> the frames
Fetch = Callable[[str, int, list[int]], Iterator[np.ndarray]]


class _Miscounted(Exception):  # noqa: N818  # no error: PyAV reads the file instead
    """The decoder finds another number of frames in the file than there are."""


def read_decord(path: str, times: Sequence[float], fit: Fit) -> np.ndarray:
    """As `read_frames`. decord does not notice frames whose errors FFmpeg conceals."""
    try:
        import decord
    except ImportError:
        raise ConfigError("decoder: decord is not installed; pip install decord, or write pyav.") from None
    decord.logging.set_level(decord.logging.QUIET)

    def fetch(path: str, count: int, wanted: list[int]) -> Iterator[np.ndarray]:
        reader = None
        try:
            reader = decord.VideoReader(path, num_threads=1)
            if len(reader) != count:
                raise _Miscounted
            for first in range(0, len(wanted), _AT_ONCE):
                yield from reader.get_batch(wanted[first : first + _AT_ONCE]).asnumpy()
        finally:
            del reader  # it keeps decoding, without limit, while it or a traceback that holds it is alive

    # decord loses frames in open GOPs
    return _read(path, times, fit, fetch, "decord", (decord.DECORDError, RuntimeError), open_gops=False)


def read_torchcodec(path: str, times: Sequence[float], fit: Fit) -> np.ndarray:
    """As `read_frames`."""
    try:
        from torchcodec.decoders import VideoDecoder  # which loads FFmpeg's shared libraries
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"decoder: torchcodec cannot be imported ({_first_line(error).rstrip('.')}); install one that fits "
            "this torch, and FFmpeg's shared libraries, or write pyav."
        ) from None

    def fetch(path: str, count: int, wanted: list[int]) -> Iterator[np.ndarray]:
        video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        if len(video) != count:
            raise _Miscounted
        for first in range(0, len(wanted), _AT_ONCE):
            yield from video.get_frames_at(wanted[first : first + _AT_ONCE]).data.numpy()

    return _read(path, times, fit, fetch, "torchcodec", (RuntimeError, ValueError, IndexError), open_gops=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read(
    path: str,
    times: Sequence[float],
    fit: Fit,
    fetch: Fetch,
    decoder: str,
    errors: tuple[type[Exception], ...],
    *,
    open_gops: bool,
) -> np.ndarray:
    """As `read_frames`. `errors` are the decoder's; `open_gops`: it reads them correctly."""
    starts = _starts(path, open_gops) if is_local(path) else None
    if starts is None:
        return read_pyav(path, times, fit)
    places = np.clip(np.searchsorted(starts, np.asarray(times) + TIME_TOLERANCE, side="right") - 1, 0, None)
    wanted = np.unique(places)
    picked = Picked(path, len(times), fit)
    try:
        frames = fetch(os.path.abspath(path), len(starts), wanted.tolist())
        for place, pixels in zip(wanted, frames, strict=True):
            picked.keep(pixels, None, np.flatnonzero(places == place).tolist())
    except _Miscounted:
        return read_pyav(path, times, fit)
    except MediaError:  # a ValueError too
        raise
    except errors as error:
        raise MediaError(path, f"cannot be decoded by {decoder}: {_first_line(error)}") from error
    return picked.frames


def _starts(path: str, open_gops: bool) -> np.ndarray | None:
    """The frames' starts in seconds after the first one's, in order; None for a file that would be misread."""
    with open_video(path) as (container, stream):
        if not {"mp4", "matroska"} & set(container.format.name.split(",")) or len(container.streams.video) > 1:
            return None
        if decoder_of(path, stream) is not stream.codec_context:  # its alpha would be dropped
            return None
        packets = [p for p in container.demux(stream) if p.size]
        ticks = [p.pts for p in packets if p.pts is not None and not p.is_discard]
        if len(ticks) < len(packets) or not ticks or not (open_gops or _are_closed(packets, ticks)):
            return None
        container.seek(min(ticks), stream=stream)
        frame = next(container.decode(stream), None)
        if frame is None or _is_misread(frame, stream):
            return None
        keys = [tick for tick, p in zip(ticks, packets) if p.is_keyframe]
        if len(keys) > 1:
            # one seek shows whether key frames are true ones
            container.seek(keys[1], stream=stream)
            with suppress(av.FFmpegError):  # damage, of frames that may not be wanted
                if not starts_at(next(container.decode(stream), frame), keys[1]):
                    return None
        return (np.sort(np.array(ticks)) - min(ticks)) * float(stream.time_base or 0)


def _are_closed(packets: Sequence[av.Packet], ticks: Sequence[int]) -> bool:
    """Whether no packet that follows a key frame is displayed before it."""
    key = -math.inf
    for packet, tick in zip(packets, ticks):
        key = tick if packet.is_keyframe else key
        if tick < key:
            return False
    return True


def _is_misread(frame: av.VideoFrame, stream: VideoStream) -> bool:
    a, b, c, d = display_matrix(frame)
    return (
        is_inexact(frame)
        or conversion_of(frame, stream) is not None
        or is_interlaced(frame, stream)
        or any(component.is_alpha for component in frame.format.components)
        or sorted(displayed_size(frame, stream)) != sorted((frame.width, frame.height))
        or a * d < b * c  # mirrored
    )
