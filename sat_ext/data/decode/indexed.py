"""What decoders that address frames by number have in common: which numbers, and which files they misread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import av
import numpy as np
from av.video.stream import VideoStream

from sat_ext.data.decode.pick import Picked, Shape
from sat_ext.data.decode.pyav import read_pyav, starts_at
from sat_ext.data.decode.rgb import display_matrix, is_foreign, is_inexact, is_interlaced, upright
from sat_ext.files import is_local
from sat_ext.media import decoder_of, displayed_size, open_video
from sat_ext.types import TIME_TOLERANCE

AT_ONCE = 8  # frames fetched together, at full size


class Miscounted(Exception):  # noqa: N818  # not an error of anybody: PyAV reads the file instead
    """The decoder finds another number of frames in the file than there are."""


def read_indexed(
    path: str,
    times: Sequence[float],
    shape: Shape,
    frames: Callable[[str, int, list[int]], Iterable[np.ndarray]],
    *,
    open_gops: bool,
) -> np.ndarray:
    """As `read_pyav`, where `frames` gives a local file's frames of some numbers, ascending, of so many in all.

    Files that such decoders misread are left to PyAV: they choose otherwise among several video streams, and seek
    to frames that intra refresh marks as key frames; decord counts the frames that an edit list hides, seeks past
    the mark in transport streams, has no times in AVI, turns mirrored videos upside down, and, without
    `open_gops`, loses frames where a group begins with some that refer to the one before it (x265's default). So
    are files that are not local, those with pixels that are not square or have alpha, interlaced ones, and those
    that are not 8-bit 4:2:0 in sRGB's colours, which they convert less exactly.
    """
    starts = _starts(path, open_gops) if is_local(path) else None
    if starts is None:
        return read_pyav(path, times, shape)
    places = np.clip(np.searchsorted(starts, np.asarray(times) + TIME_TOLERANCE, side="right") - 1, 0, None)
    wanted = np.unique(places)
    picked = Picked(path, len(times))
    try:
        for place, pixels in zip(wanted, frames(path, len(starts), wanted.tolist()), strict=True):
            picked.keep(pixels, shape(pixels, None), np.flatnonzero(places == place).tolist())
    except Miscounted:
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
