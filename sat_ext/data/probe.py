"""What a media file holds, or why it cannot be read.

It reads headers, one frame for its rotation, and packets where headers do not give the length. Animated WebP is
decoded, because only that shows how long its frames last.
"""

from fractions import Fraction
from itertools import islice, pairwise

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from sat_ext.errors import MediaError
from sat_ext.files import container_of, is_url, suffix_of
from sat_ext.media import (
    SIDEWAYS,
    UNTIMED_FORMATS,
    decoder_of,
    displayed_size,
    frames_of,
    open_image,
    open_video,
    orientation_of,
    refuse_unreadable_colours,
)
from sat_ext.types import IMAGE_EXTENSIONS, MediaInfo

_HEAD = 32  # frames; decoders put off at most 16
_MAX_ANIMATION = 1 << 34  # pixels of all frames: a minute's decoding, at 300 million a second


def probe(path: str) -> MediaInfo:
    """Size, length and rate of an image or a video.

    Animated GIF and WebP files are clips. If the rate varies, `fps` is the mean. Raises `MediaError` for a file
    that is missing, empty, truncated, of unknown format, without a video stream, or whose first frame cannot be
    decoded. The pixels of a still and the later frames of a video are not read.
    """
    return _probe_image(path) if suffix_of(path) in IMAGE_EXTENSIONS else _probe_video(path)


def _probe_image(path: str) -> MediaInfo:
    with open_image(path) as image:
        width, height = image.size
        codec = (image.format or "").lower()
        if codec in ("gif", "webp") and getattr(image, "is_animated", False):
            gif = _probe_video(path) if codec == "gif" else None
            frames = gif.frames if gif else image.n_frames  # type: ignore[attr-defined]
            # Animations are decoded from their start, so a small file could keep a reader busy for hours.
            if width * height * frames > _MAX_ANIMATION:
                raise MediaError(
                    path,
                    f"{frames} frames of {width}x{height}, over the limit of {_MAX_ANIMATION} pixels for an "
                    "animation; make it a video",
                )
            if gif:
                return gif
            # FFmpeg does not read animated WebP; Pillow gives a frame's duration only after decoding it.
            duration = Fraction(sum(frame.info["duration"] for frame in frames_of(image)), 1000)
            return _info(width, height, frames=frames, duration=duration, codec=codec)
        if orientation_of(image) in SIDEWAYS:
            width, height = height, width
    return _info(width, height, frames=1, duration=Fraction(0), codec=codec)


def _probe_video(path: str) -> MediaInfo:
    with open_video(path, headers_only=True) as (container, stream):
        codec = stream.codec_context.codec.canonical_name  # not the decoder's, such as libdav1d
        counted = _count_from_header(path, container, stream)
        width, height = _displayed_size(path, container, stream)
    if counted is None and is_url(container_of(path)):
        counted = _count_from_ends(path)
    frames, duration = counted or _count_packets(path)
    return _info(width, height, frames=frames, duration=duration, codec=codec)


def _info(width: int, height: int, *, frames: int, duration: Fraction, codec: str) -> MediaInfo:
    if frames == 1:
        duration = Fraction(0)
    fps = float(frames / duration) if duration else 0.0
    return MediaInfo(width=width, height=height, frames=frames, fps=fps, duration=float(duration), codec=codec)


def _displayed_size(path: str, container: InputContainer, stream: VideoStream) -> tuple[int, int]:
    """Width and height of the first key frame, the only thing that shows the rotation in every container."""
    context = decoder_of(path, stream)
    for packet in container.demux(stream):
        if packet.size and not packet.is_keyframe:
            continue
        # Draining makes the decoder return the frame without waiting for those that it would reorder.
        frames = context.decode(packet) or (context.decode(None) if packet.size else [])
        if frames:
            frame = frames[0]
            refuse_unreadable_colours(path, frame)
            return displayed_size(frame, stream)
        context.flush_buffers()
    raise MediaError(path, "no frame can be decoded")


def _count_from_header(path: str, container: InputContainer, stream: VideoStream) -> tuple[int, Fraction] | None:
    """Frames and duration from the index of MP4 and MOV.

    None if it is absent (fragments), if an edit list hides frames, or if the rate varies, as the index is in
    decoding order.
    """
    if "mp4" not in container.format.name or stream.time_base is None:
        return None
    entries = list(stream.index_entries)
    end = max((e.pos + e.size for e in entries), default=0)
    if end > container.size:
        raise MediaError(path, f"truncated: its index reaches to byte {end} of {container.size}")
    steps = {b.timestamp - a.timestamp for a, b in pairwise(entries)} or {0}
    steady = max(steps) - min(steps) <= 1  # a tick of rounding
    if not entries or len(entries) != stream.frames or any(e.is_discard for e in entries) or not steady:
        return None
    span = entries[-1].timestamp - entries[0].timestamp
    # The header's duration may be missing or wrong; it only says how long the last frame lasts.
    last = max(Fraction(span, max(1, len(entries) - 1)), Fraction((stream.duration or 0) - span))
    return len(entries), (span + last) * stream.time_base


def _count_from_ends(path: str) -> tuple[int, Fraction] | None:
    """Frames and duration of a remote AVI file from its index, of a Matroska file from its first frames and the
    last group that its index points to, as reading every packet would fetch the whole file. None without an index
    or a steady rate.
    """
    with open_video(path, headers_only=True) as (container, stream):
        rate, base = stream.average_rate, stream.time_base
        if not rate or not base:
            return None
        if container.format.name == "avi":
            count = sum(entry.size > 0 for entry in stream.index_entries)
            return (count, count / rate) if count else None
        if "matroska" not in container.format.name or container.duration is None:
            return None
        head = [p.pts for p in islice(container.demux(stream), _HEAD) if p.size and p.pts is not None]
        if len(head) < _HEAD or not len(stream.index_entries):
            return None
        container.seek(int(Fraction(container.duration, av.time_base) / base), stream=stream)
        tail = [p.pts for p in container.demux(stream) if p.size and p.pts is not None]
    first, step = min(head), 1 / (rate * base)
    known = sorted(head)[: _HEAD // 2], sorted(tail)  # later ones may follow frames that were not read
    if not tail or any(abs(b - a - step) > 1 for part in known for a, b in pairwise(part)):
        return None
    count = round((known[1][-1] - first) / step) + 1
    return count, count / rate


def _count_packets(path: str) -> tuple[int, Fraction]:
    """Frames and duration by reading every packet, without decoding."""
    starts: list[int] = []
    lengths: set[int] = set()
    end = 0
    with open_video(path, headers_only=True) as (container, stream):
        base = stream.time_base or Fraction(1)
        rate = stream.average_rate or stream.guessed_rate
        timed = container.format.name not in UNTIMED_FORMATS
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            start = packet.pts if packet.pts is not None else packet.dts
            timed = timed and start is not None
            starts.append(start or 0)
            lengths.add(packet.duration or 0)
            end = max(end, starts[-1] + (packet.duration or 0))
    if not starts:
        raise MediaError(path, "its video stream has no frames")
    if not timed:
        return len(starts), len(starts) / rate if rate else Fraction(0)
    first, last = min(starts), max(starts)
    mean = (last - first) // max(1, len(starts) - 1)
    # If frames have no length, or all one that is far from their steps (a header's), the last frame lasts as long
    # as the others on average.
    if mean and (end == last or (len(lengths) == 1 and not mean <= 2 * max(lengths) <= 4 * mean)):
        end = last + mean
    return len(starts), (end - first) * base
