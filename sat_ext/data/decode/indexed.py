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

from sat_ext.data.decode.pick import Picked, Shape
from sat_ext.data.decode.pyav import read_pyav, starts_at
from sat_ext.data.decode.rgb import display_matrix, is_foreign, is_inexact, is_interlaced, upright
from sat_ext.errors import ConfigError, MediaError
from sat_ext.files import is_local
from sat_ext.media import decoder_of, displayed_size, open_video
from sat_ext.types import TIME_TOLERANCE

_AT_ONCE = 8  # frames fetched together, at full size

# (path, frames in the file, their wanted numbers, ascending) -> the frames
Fetch = Callable[[str, int, list[int]], Iterator[np.ndarray]]


class _Miscounted(Exception):  # noqa: N818  # nobody's error: PyAV reads the file instead
    """The decoder finds another number of frames in the file than there are."""


def read_decord(path: str, times: Sequence[float], shape: Shape) -> np.ndarray:
    """See `read_frames`. decord does not notice frames whose errors FFmpeg conceals."""
    try:
        import decord
    except ImportError:
        raise ConfigError("decoder: decord is not installed; pip install decord, or write pyav.") from None
    decord.logging.set_level(decord.logging.QUIET)

    def fetch(path: str, count: int, wanted: list[int]) -> Iterator[np.ndarray]:
        reader = None
        try:
            reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
            if len(reader) != count:
                raise _Miscounted
            for first in range(0, len(wanted), _AT_ONCE):
                yield from reader.get_batch(wanted[first : first + _AT_ONCE]).asnumpy()
        finally:
            del reader  # it keeps decoding, without limit, while it or a traceback that holds it is alive

    try:
        return _read(path, times, shape, fetch, open_gops=False)
    except (decord.DECORDError, RuntimeError) as error:
        raise MediaError(path, f"cannot be decoded by decord: {_first_line(error)}") from error


def read_torchcodec(path: str, times: Sequence[float], shape: Shape) -> np.ndarray:
    """See `read_frames`."""
    try:
        from torchcodec.decoders import VideoDecoder  # which loads FFmpeg's shared libraries
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"decoder: torchcodec cannot be imported ({_first_line(error).rstrip('.')}); install one that fits "
            "this torch, and FFmpeg's shared libraries, or write pyav."
        ) from None

    def fetch(path: str, count: int, wanted: list[int]) -> Iterator[np.ndarray]:
        video = VideoDecoder(
            os.path.abspath(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )
        if len(video) != count:
            raise _Miscounted
        for first in range(0, len(wanted), _AT_ONCE):
            yield from video.get_frames_at(wanted[first : first + _AT_ONCE]).data.numpy()

    try:
        return _read(path, times, shape, fetch, open_gops=True)
    except MediaError:  # a ValueError too
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise MediaError(path, f"cannot be decoded by torchcodec: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read(path: str, times: Sequence[float], shape: Shape, fetch: Fetch, *, open_gops: bool) -> np.ndarray:
    """As `read_pyav`. `open_gops`: the decoder reads them correctly."""
    starts = _starts(path, open_gops) if is_local(path) else None
    if starts is None:
        return read_pyav(path, times, shape)
    places = np.clip(np.searchsorted(starts, np.asarray(times) + TIME_TOLERANCE, side="right") - 1, 0, None)
    wanted = np.unique(places)
    picked = Picked(path, len(times))
    try:
        for place, pixels in zip(wanted, fetch(path, len(starts), wanted.tolist()), strict=True):
            picked.keep(pixels, shape(pixels, None), np.flatnonzero(places == place).tolist())
    except _Miscounted:
        return read_pyav(path, times, shape)
    return picked.array()


def _starts(path: str, open_gops: bool) -> np.ndarray | None:
    """The frames' starts in seconds after the first one's, in order; None for a file that would be misread."""
    with open_video(path) as (container, stream):
        if not {"mp4", "matroska"} & set(container.format.name.split(",")) or len(container.streams.video) > 1:
            return None
        if decoder_of(path, stream) is not stream.codec_context:  # its alpha would be dropped
            return None
        packets = [p for p in container.demux(stream) if p.size]
        ticks = [p.pts for p in packets if p.pts is not None and not p.is_discard]
        if len(ticks) < len(packets) or not ticks or not (open_gops or _are_closed(packets)):
            return None
        container.seek(min(ticks), stream=stream)
        frame = next(container.decode(stream), None)
        if frame is None or _is_misread(frame, stream):
            return None
        keys = [p.pts for p in packets if p.is_keyframe and p.pts is not None and not p.is_discard]
        if len(keys) > 1:
            container.seek(keys[1], stream=stream)
            with suppress(av.FFmpegError):  # damage, of frames that may not be wanted
                if not starts_at(next(container.decode(stream), frame), keys[1]):
                    return None
        return (np.sort(np.array(ticks)) - min(ticks)) * float(stream.time_base or 0)


def _are_closed(packets: Sequence[av.Packet]) -> bool:
    """Whether no packet that follows a key frame is displayed before it."""
    key = -math.inf
    for packet in packets:
        key = packet.pts if packet.is_keyframe and packet.pts is not None else key
        if packet.pts is not None and packet.pts < key:
            return False
    return True


def _is_misread(frame: av.VideoFrame, stream: VideoStream) -> bool:
    if is_inexact(frame) or is_foreign(stream) or is_interlaced(frame, stream):
        return True
    if any(component.is_alpha for component in frame.format.components):
        return True
    if sorted(displayed_size(frame, stream)) != sorted((frame.width, frame.height)):
        return True
    turned = upright(np.arange(4).reshape(2, 2), display_matrix(frame))
    return not any(np.array_equal(turned, np.rot90(np.arange(4).reshape(2, 2), k)) for k in range(4))
