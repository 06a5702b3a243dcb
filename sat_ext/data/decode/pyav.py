"""Clips by PyAV: FFmpeg, decoding no more than the wanted frames need."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import PictureType
from av.video.stream import VideoStream

from sat_ext.data.decode.pick import DEEPEST_REORDER, Damage, Needed, pick
from sat_ext.data.decode.rgb import Converter, Decoded
from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError
from sat_ext.files import expect, suffix_of
from sat_ext.media import UNTIMED_FORMATS, decoder_of, open_video
from sat_ext.types import TIME_TOLERANCE

# If a seek lands after the wanted frame (open GOPs, transport streams), seek earlier, then read from the start.
_SEEK_LEADS = (0.0, 10.0, math.inf)

# Their headers hold all that decoding needs, even how far B-frames reach. Matroska has no start time there.
_FULL_HEADERS = frozenset({".mp4", ".m4v", ".mov"})

# Each packet holds one frame and its time, so unwanted frames are known before they are decoded.
_FRAMED_FORMATS = frozenset({"mp4", "matroska"})

# Their decoders can skip frames that no other frame refers to; dav1d and libvpx cannot.
_SKIPPING_CODECS = frozenset({"h264", "hevc"})

# MP4's headers say how far B-frames reach in these; codecs with only key frames have no B-frames.
_ORDERED_CODECS = frozenset({"h264", "hevc", "vp9", "libdav1d", "av1"})

_BUFFER = 32 << 10  # bytes that FFmpeg reads at once
_LOOKAHEAD = 2 * DEEPEST_REORDER  # packets that are known before one is judged


def read_pyav(path: str, times: Sequence[float], fit: Fit) -> np.ndarray:
    """As `read_frames`."""
    for lead in _SEEK_LEADS:
        with _open(path) as (container, stream):
            _expect(container, stream, min(times) - lead, max(times))
            frames = _decode(path, container, stream, times, lead)
            if frames is not None:
                return pick(path, frames, times, Converter(path, stream), fit)
    raise AssertionError("reading from the start of a file seeks nowhere")


@contextmanager
def _open(path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """`open_video`, without the 25 ms of decoding at open where the headers say enough."""
    if suffix_of(path) in _FULL_HEADERS:
        with open_video(path, headers_only=True) as (container, stream):
            context = stream.codec_context
            known = stream.start_time is not None and stream.average_rate and context.width
            if known and (context.name in _ORDERED_CODECS or context.codec.intra_only):
                yield container, stream
                return
    with open_video(path) as opened:
        yield opened


def _expect(container: InputContainer, stream: VideoStream, first: float, last: float) -> None:
    """Tell a remote file which of its bytes the frames between two times take, by the index of MP4."""
    entries, base, file = stream.index_entries, stream.time_base, getattr(container.file, "file", None)
    if not file or not base or "mp4" not in container.format.name or not len(entries):
        return
    begin, end = (
        max(
            0, entries.search_timestamp(math.floor((stream.start_time or 0) + max(t, 0) / base), any_frame=is_last)
        )
        for t, is_last in ((first, False), (last, True))
    )
    if last > 0:  # then those are read, too, that may be shown before
        end = min(end + DEEPEST_REORDER + 4, len(entries) - 1)
    # FFmpeg's buffer reaches further than the frame
    expect(file, entries[begin].pos, entries[end].pos + entries[end].size + _BUFFER)


def _decode(
    path: str, container: InputContainer, stream: VideoStream, times: Sequence[float], lead: float
) -> Iterator[tuple[float, Decoded]] | None:
    """Frames in display order with their starts, from the one on display at the earliest time or before.

    None when the seek, to `lead` seconds earlier, went too far or to a frame that is no true key frame.
    """
    first = min(times)
    clip = _Clip(path, container, stream, times)
    if not clip.timed or first <= lead or stream.start_time is None or stream.time_base is None:
        return clip.frames()
    ticks = math.floor((first - lead + TIME_TOLERANCE) / stream.time_base)
    with suppress(av.FFmpegError):  # where a format cannot seek, reading starts at the start
        container.seek(stream.start_time + ticks, stream=stream)
    frames = clip.frames()
    earliest = next(frames, None)
    if earliest is None or earliest[0] > first + TIME_TOLERANCE or not starts_at(earliest[1][0], clip.key):
        return None
    return chain([earliest], frames)


def starts_at(frame: av.VideoFrame, key: int | None) -> bool:
    """Whether the first frame after a seek to the key frame at `key` depends on no frame before it.

    Under intra refresh, what is marked as a key frame is a P-frame from which the picture recovers within some
    frames. FFmpeg holds these back, but at the end of a clip x264 promises it of some that never recover.
    """
    if frame.pts is None or key is None or frame.pts < key:
        return True
    return frame.pts == key and frame.pict_type not in (PictureType.P, PictureType.B)


class _Clip:
    """An open file, read once from the next key frame on, as far as `times` need it."""

    def __init__(self, path: str, container: InputContainer, stream: VideoStream, times: Sequence[float]) -> None:
        self._path, self._container, self._stream = path, container, stream
        self._decoder = decoder_of(path, stream)
        self.timed = container.format.name not in UNTIMED_FORMATS
        self._times = sorted(times)
        rate = stream.average_rate or stream.guessed_rate
        self._period = float(1 / rate) if rate else 0.0
        self._base = float(stream.time_base or 0)
        self._origin = stream.start_time
        self._last_dts = -math.inf
        self._whole = False  # read to its end
        self.key: int | None = None  # where reading began, unless frames follow from it that are not displayed

    def frames(self) -> Iterator[tuple[float, Decoded]]:
        """Frames in display order, each with its start in seconds after the stream's first frame.

        Frames that no time asks for may be missing.
        """
        start = -self._period
        damage = Damage()
        held: deque[tuple[float, av.VideoFrame, int]] = deque()
        for frame in self._decoded(damage):
            if self.timed and frame.pts is not None:
                self._origin = frame.pts if self._origin is None else self._origin
                start = (frame.pts - self._origin) * self._base
            else:
                start += self._period
            held.append((start, frame, damage.receive(frame.pts, is_corrupt=frame.is_corrupt)))
            while held and (damage.is_settled(held[0][2]) or len(held) > DEEPEST_REORDER):
                at, frame, place = held.popleft()
                yield at, (frame, damage.reaches(place, is_key=frame.key_frame))
        for at, frame, place in held:
            yield at, (frame, damage.reaches(place, is_key=frame.key_frame))
        # Reached only when a wanted time lies at the end: `pick` stops earlier otherwise.
        index = self._stream.index_entries
        has_index = "mp4" in self._container.format.name and len(index) > 0
        if self._whole and has_index and self._last_dts < index[-1].timestamp:
            missing = f"its last frames are missing, from {start + self._period:.3f} s on"
            raise MediaError(self._path, f"truncated: {missing}")

    def _decoded(self, damage: Damage) -> Iterator[av.VideoFrame]:
        context = self._decoder
        for packet, is_needed in self._judged():
            if not is_needed and context.codec.intra_only:
                continue
            # A frame that others refer to must be decoded, wanted or not.
            context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            damage.send(packet.pts)
            yield from context.decode(packet)
        if not self._whole:  # at the file's end, an empty packet has done this
            yield from context.decode(None)

    def _judged(self) -> Iterator[tuple[av.Packet, bool]]:
        """Packets in decoding order, and whether their frames are needed for themselves."""
        needed = self._needed()
        if needed is None:
            yield from ((packet, True) for packet in self._packets())
            return
        ahead: deque[av.Packet] = deque()
        for packet in self._packets():
            # Discarded packets are hidden by an edit list; the empty one at the end holds no frame.
            if packet.pts is not None and not packet.is_discard:
                needed.add(packet.pts)
            ahead.append(packet)
            if needed.is_complete or self._is_first_alone(packet):
                # what follows the last wanted frame only had to be read to find it
                while ahead and not needed.is_on_display(ahead[-1].pts):
                    ahead.pop()
                break
            if len(ahead) > _LOOKAHEAD:
                packet = ahead.popleft()
                yield packet, needed.is_on_display(packet.pts)
        for packet in ahead:
            yield packet, needed.is_on_display(packet.pts)

    def _needed(self) -> Needed | None:
        """None where every packet must be decoded, up to the first frame after the latest time."""
        context, formats = self._decoder, set(self._container.format.name.split(","))
        if not formats & _FRAMED_FORMATS or self._origin is None or not self._base:
            return None
        if context.name not in _SKIPPING_CODECS and not context.codec.intra_only:
            return None
        return Needed([self._origin + (t + TIME_TOLERANCE) / self._base for t in self._times])

    def _is_first_alone(self, packet: av.Packet) -> bool:
        """Whether the packet is all that is needed: the first frame, and a key frame."""
        return (
            self._times[-1] <= 0
            and packet.is_keyframe
            and packet.pts == self._origin
            and self._period > 2 * TIME_TOLERANCE
        )

    def _packets(self) -> Iterator[av.Packet]:
        """From the first key frame on: before it, a stream that was cut refers to frames that are missing."""
        synchronised = False
        for packet in self._container.demux(self._stream):
            self._last_dts = max(self._last_dts, packet.dts if packet.dts is not None else -math.inf)
            if packet.is_keyframe and not synchronised:
                synchronised = True
                self.key = None if packet.is_discard or self._decoder.codec.intra_only else packet.pts
            # An empty packet would end decoding. The last one, without times, should; a frame that the encoder
            # dropped, which has times, should not.
            if (packet.size and not synchronised) or (not packet.size and packet.dts is not None):
                continue
            self._whole = self._whole or not packet.size
            yield packet
