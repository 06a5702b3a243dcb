"""Media to uint8 RGB frames. Clips are read by time, so that every decoder and frame rate means the same."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from sat_ext.errors import ConfigError, MediaError
from sat_ext.media import UNTIMED_FORMATS, open_image, open_video, to_rgb
from sat_ext.types import MAX_PIXELS, TIME_TOLERANCE

# Where a seek ends behind the wanted frame (open GOPs, transport streams): from earlier, then from the start.
_SEEK_LEADS = (0.0, 10.0, math.inf)

_DEEPEST_REORDER = 16  # frames that a decoder may keep back; H.264 and HEVC set this limit

_Decoded = tuple[av.VideoFrame, bool]  # a frame, and whether it is damaged


def read_still(path: str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image as uint8 (1, H, W, 3) in sRGB: upright after its EXIF data, transparency flattened on white.

    Of an animation, the first frame. Raises `MediaError` for a file that is missing, damaged, of no known
    format, or larger than `max_pixels`.
    """
    with open_image(path, max_pixels=max_pixels) as image:
        return np.array(to_rgb(ImageOps.exif_transpose(image)))[None]


def read_frames(path: str, times: Sequence[float], *, decoder: str = "auto") -> np.ndarray:
    """The frames on display at `times`, as uint8 (len(times), H, W, 3), upright.

    `times` are seconds from the start of the first frame, in any order. On display at t is the last frame
    that starts at or before t + `TIME_TOLERANCE`; before the first frame the first, after the last the last.
    The file is read once, from the key frame before the earliest time to the frame after the latest.

    `decoder` is a name of `DECODERS`; their results are equal on 8-bit video. Raises `ConfigError` for
    another name, and `MediaError` when a wanted frame cannot be had, or only with errors in it.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"decoder: '{decoder}' is not known; valid: {', '.join(DECODERS)}.")
    assert len(times) > 0, "no times asked for"
    if os.path.splitext(path)[1].lower() == ".webp":  # FFmpeg does not read animated ones
        return _read_animated_webp(path, times)
    return DECODERS[decoder](path, times)


# --- stills ---


def _read_animated_webp(path: str, times: Sequence[float]) -> np.ndarray:
    def frames(image: Image.Image) -> Iterator[tuple[float, Image.Image]]:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            yield image.info.get("timestamp", 0) / 1000, image.copy()

    with open_image(path) as image:
        return _pick(path, frames(image), times, lambda frame: np.asarray(to_rgb(frame)))


# --- picking ---


def _pick(
    path: str,
    frames: Iterator[tuple[float, Any]],
    times: Sequence[float],
    convert: Callable[[Any], np.ndarray],
) -> np.ndarray:
    """The frames on display at `times`, out of (start in seconds, frame) in order of display.

    Stops after the first frame behind the latest time. Only wanted frames are converted.
    """
    order = sorted(range(len(times)), key=times.__getitem__)
    out: np.ndarray | None = None

    def keep(frame: Any, wanted: list[int]) -> None:
        nonlocal out
        pixels = convert(frame)
        if out is None:
            out = np.empty((len(times), *pixels.shape), np.uint8)
        if pixels.shape != out.shape[1:]:
            raise MediaError(path, f"its frames change size, from {out.shape[2]}x{out.shape[1]}")
        out[wanted] = pixels

    shown: Any = None
    for start, frame in frames:
        due = [i for i in order if times[i] + TIME_TOLERANCE < start] if shown is not None else []
        if due:
            keep(shown, due)
            order = order[len(due) :]
            if not order:
                break
        shown = frame
    if shown is None:
        raise MediaError(path, "no frame can be decoded")
    if order:
        keep(shown, order)
    assert out is not None
    return out


# --- PyAV ---


def _read_pyav(path: str, times: Sequence[float]) -> np.ndarray:
    reformatter = VideoReformatter()
    for lead in _SEEK_LEADS:
        with open_video(path) as (container, stream):
            frames = _decode(path, container, stream, min(times), lead)
            if frames is not None:
                return _pick(path, frames, times, lambda decoded: _to_array(path, decoded, reformatter))
    raise AssertionError("reading from the start of a file seeks nowhere")


def _decode(
    path: str, container: InputContainer, stream: VideoStream, first: float, lead: float
) -> Iterator[tuple[float, _Decoded]] | None:
    """Frames in order of display with their starts, from the one on display at `first` or earlier.

    None when the seek, to `lead` seconds before `first`, went too far.
    """
    timed = container.format.name not in UNTIMED_FORMATS
    if not timed or first <= lead or stream.start_time is None or stream.time_base is None:
        return _timed(path, container, stream, timed)
    ticks = math.floor((first - lead + TIME_TOLERANCE) / stream.time_base)
    with suppress(av.FFmpegError):  # where a format cannot seek, reading starts at the start
        container.seek(stream.start_time + ticks, stream=stream)
    frames = _timed(path, container, stream, timed)
    earliest = next(frames, None)
    if earliest is None or earliest[0] > first + TIME_TOLERANCE:
        return None
    return chain([earliest], frames)


def _timed(
    path: str, container: InputContainer, stream: VideoStream, timed: bool
) -> Iterator[tuple[float, _Decoded]]:
    """Frames from the next key frame on, each with its start in seconds after the stream's first frame."""
    rate = stream.average_rate or stream.guessed_rate
    period = float(1 / rate) if rate else 0.0
    base = float(stream.time_base or 0)
    origin = stream.start_time
    start, last, synchronised = -period, -math.inf, False
    order = _DecodingOrder()
    held: deque[tuple[float, av.VideoFrame, int]] = deque()
    for packet in container.demux(stream):
        last = max(last, packet.dts if packet.dts is not None else -math.inf)
        # A stream that was cut starts with frames that refer to missing ones. An empty packet (a frame that
        # the encoder dropped) would mean the end to the decoder, as the last one, without times, shall do.
        synchronised = synchronised or packet.is_keyframe
        if (packet.size and not synchronised) or (not packet.size and packet.dts is not None):
            continue
        order.send(packet.pts)
        for frame in packet.decode():
            assert isinstance(frame, av.VideoFrame)
            if timed and frame.pts is not None:
                origin = frame.pts if origin is None else origin
                start = (frame.pts - origin) * base
            else:
                start += period
            held.append((start, frame, order.receive(frame)))
            while held and (order.settled(held[0][2]) or len(held) > _DEEPEST_REORDER):
                at, frame, number = held.popleft()
                yield at, (frame, order.is_damaged(frame, number))
    for at, frame, number in held:
        yield at, (frame, order.is_damaged(frame, number))
    # Reached only when a wanted time lies at the end of the file, or behind it.
    index = stream.index_entries
    if "mp4" in container.format.name and len(index) and index[-1].timestamp > last:
        raise MediaError(path, f"truncated: its last frames are missing, from {start + period:.3f} s on")


class _DecodingOrder:
    """Tells which frames are damaged, in themselves or by those that they copy from.

    FFmpeg conceals errors and marks only the frame that has them. Others copy from it, up to the next key
    frame, and B-frames do so before it is displayed itself. So a frame is not settled until all that were
    decoded before it have come out.
    """

    def __init__(self) -> None:
        self._sent = 0
        self._inside: dict[int, int] = {}  # by pts: the places in decoding order of what has not come out
        self._corrupt: list[int] = []
        self._key = 0  # the place of the last key frame displayed

    def send(self, pts: int | None) -> None:
        self._sent += 1
        if pts is not None:
            self._inside[pts] = self._sent

    def receive(self, frame: av.VideoFrame) -> int:
        """The frame's place in decoding order."""
        place = self._sent
        if frame.pts is not None:
            place = self._inside.get(frame.pts, place)
            # Frames come out in order of display: what is older and still inside was dropped.
            self._inside = {pts: n for pts, n in self._inside.items() if pts > frame.pts}
        if frame.is_corrupt:
            self._corrupt.append(place)
        return place

    def settled(self, place: int) -> bool:
        return all(n > place for n in self._inside.values())

    def is_damaged(self, frame: av.VideoFrame, place: int) -> bool:
        """To be asked in order of display."""
        if frame.key_frame:
            self._key = place
        return any(self._key <= n <= place for n in self._corrupt)


def _to_array(path: str, decoded: _Decoded, reformatter: VideoReformatter) -> np.ndarray:
    frame, damaged = decoded
    if damaged:
        raise MediaError(path, f"the data of its frame at {frame.time or 0:.3f} s is damaged")
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(path, f"{frame.width}x{frame.height} pixels, over the limit of {MAX_PIXELS}")
    if any(component.is_alpha for component in frame.format.components):
        rgba = reformatter.reformat(frame, format="rgba", threads=1).to_ndarray()
        alpha = rgba[..., 3:].astype(np.uint16)
        flat = rgba[..., :3] * alpha + 255 * (255 - alpha)  # on white, as stills are
        return _upright(((flat + 127) // 255).astype(np.uint8), frame)
    return _upright(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray(), frame)


def _upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """The pixels turned and mirrored by the frame's display matrix, which neither FFmpeg nor PyAV applies.

    The matrix has rows (a, b, u), (c, d, v), (x, y, w) and sends (p, q) to (ap + cq + x, bp + dq + y):
    FFmpeg's libavutil/display.h. Only quarter turns and mirror images occur in files.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = (int(v) for v in np.frombuffer(matrix, np.int32)[:5])
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# --- decord ---


def _read_decord(path: str, times: Sequence[float]) -> np.ndarray:
    """As `_read_pyav`, by decord, which does not notice frames whose errors FFmpeg conceals.

    Files that decord addresses wrongly are left to PyAV: it counts the frames that an edit list hides, seeks
    past the mark in transport streams, has no times in AVI, and turns mirrored videos upside down.
    """
    try:
        import decord
    except ImportError:
        raise ConfigError("decoder: decord is not installed; pip install decord, or write pyav.") from None

    starts = _starts_for_decord(path)
    if starts is None:
        return _read_pyav(path, times)
    decord.logging.set_level(decord.logging.QUIET)
    places = np.searchsorted(starts, np.asarray(times) + TIME_TOLERANCE, side="right") - 1
    try:
        frames = reader = None
        try:
            reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
            if len(reader) == len(starts):
                frames = reader.get_batch(np.clip(places, 0, None).tolist()).asnumpy()
        finally:
            del reader  # it decodes on, without limit, for as long as it or a traceback with it lives
    except (decord.DECORDError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MediaError(path, f"cannot be decoded by decord: {reason}") from error
    return _read_pyav(path, times) if frames is None else frames


def _starts_for_decord(path: str) -> np.ndarray | None:
    """The frames' starts in seconds after the first one's, in order; None for a file that decord misreads."""
    with open_video(path) as (container, stream):
        if not {"mp4", "matroska"} & set(container.format.name.split(",")):
            return None
        packets = [p for p in container.demux(stream) if p.size]
        ticks = [p.pts for p in packets if p.pts is not None and not p.is_discard]
        if len(ticks) < len(packets) or not ticks:
            return None
        container.seek(min(ticks), stream=stream)
        frame = next(container.decode(stream), None)
        if frame is None or _is_mirrored(frame):
            return None
        return (np.sort(np.array(ticks)) - min(ticks)) * float(stream.time_base or 0)


def _is_mirrored(frame: av.VideoFrame) -> bool:
    turned = _upright(np.arange(4).reshape(2, 2), frame)
    return not any(np.array_equal(turned, np.rot90(np.arange(4).reshape(2, 2), k)) for k in range(4))


# PyAV by default: decord cannot read AV1, fails on VP9, and does not notice damage that FFmpeg conceals.
DECODERS: dict[str, Callable[[str, Sequence[float]], np.ndarray]] = {
    "auto": _read_pyav,
    "pyav": _read_pyav,
    "decord": _read_decord,
}
