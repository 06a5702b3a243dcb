"""Decoded frames to RGB: their colours, alpha and fields, upright and with square pixels."""

import math
from typing import Any

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter
from av.video.stream import VideoStream

from sat_ext.colour import Conversion, to_srgb
from sat_ext.data.decode.pick import Size
from sat_ext.errors import MediaError
from sat_ext.media import displayed_size, refuse_unreadable_colours

# swscale's quick way misses the colours of 8-bit 4:2:0 video by up to 2.4 levels, in a ninth of the exact time. It
# misses those of other formats by more than 3, in half the time (3.5 ms a 1080p frame in place of 7).
_QUICK_FORMATS = frozenset({"yuv420p", "yuvj420p"})
_BILINEAR = 2  # flags of libswscale/swscale.h, which older PyAV does not name
_EXACT = _BILINEAR | 0x2000 | 0x40000  # SWS_FULL_CHR_H_INT, SWS_ACCURATE_RND

# Their frames say themselves whether they are interlaced; one clip may mix both.
_TELLING_CODECS = frozenset({"h264", "hevc", "mpeg2video", "vc1"})

_PROGRESSIVE = 1  # of AVFieldOrder in libavcodec/defs.h: 0 is unknown, 2 to 5 are the orders of two fields

Decoded = tuple[av.VideoFrame, bool]  # a frame, and whether it is damaged

# (a, b, c, d) of a display matrix with the rows (a, b, u), (c, d, v), (x, y, w), which sends (p, q) to
# (ap + cq + x, bp + dq + y): FFmpeg's libavutil/display.h.
Matrix = tuple[int, int, int, int]
IDENTITY: Matrix = (1, 0, 0, 1)


class Converter:
    """Converts decoded frames of one clip to RGB."""

    def __init__(self, path: str, stream: VideoStream) -> None:
        self._path, self._stream = path, stream
        self._reformatter = VideoReformatter()
        self._matrix, self._rotation = IDENTITY, math.nan  # which differs from any, so the first frame sets both
        self._fields: tuple[tuple[int, int, str], av.filter.Graph] | None = None

    def __call__(self, decoded: Decoded) -> tuple[np.ndarray, Size | None]:
        """The pixels, uint8 (H, W, 3), and their size as displayed, if not (W, H). `MediaError` for damage."""
        frame, damaged = decoded
        if damaged:
            raise MediaError(self._path, f"the data of its frame at {frame.time or 0:.3f} s is damaged")
        refuse_unreadable_colours(self._path, frame)
        if frame.rotation != self._rotation:  # reading the matrix of every frame would keep every frame alive
            self._matrix, self._rotation = display_matrix(frame), frame.rotation
        pixels = upright(self._rgb(frame), self._matrix)
        size = displayed_size(frame, self._stream)
        return pixels, None if size == pixels.shape[1::-1] else size

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        if is_interlaced(frame, self._stream):
            frame = self._one_field(frame)
        convert = conversion_of(frame, self._stream)
        alpha = any(component.is_alpha for component in frame.format.components)
        name = (("gbrp16le", "gbrap16le") if convert else ("rgb24", "rgba"))[alpha]
        flags = _EXACT if is_inexact(frame) else _BILINEAR
        frame = self._reformatter.reformat(frame, format=name, interpolation=flags, threads=1)
        if name == "rgb24":  # without the copy of `to_ndarray`
            plane = frame.planes[0]
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
            return rows[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)
        pixels = np.asarray(frame.to_ndarray(), np.uint16 if convert else np.uint8)
        rgb = convert(pixels[..., :3]) if convert else pixels[..., :3]
        if not alpha:
            return rgb
        weight = pixels[..., 3:].astype(np.uint16) >> (8 if convert else 0)
        flat = rgb * weight + 255 * (255 - weight)  # on white, as stills are
        return ((flat + 127) // 255).astype(np.uint8)

    def _one_field(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The upper of the frame's two fields, which show different moments, enlarged to the frame's size.

        Better filters need neighbouring frames, which are not all decoded, or 77 ms at 1080p (estdif), not 6.
        """
        shape = frame.width, frame.height, frame.format.name
        if self._fields is None or self._fields[0] != shape:
            graph = av.filter.Graph()
            graph.threads = 1
            width, height, _ = shape
            source = graph.add_buffer(width=width, height=height, format=frame.format, time_base=frame.time_base)
            scale = graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd")
            graph.link_nodes(source, graph.add("field", "top"), scale, graph.add("buffersink")).configure()
            self._fields = shape, graph
        self._fields[1].push(frame)
        field = self._fields[1].pull()
        assert isinstance(field, av.VideoFrame)
        return field


def is_inexact(frame: av.VideoFrame) -> bool:
    """Whether swscale's quick way, which other decoders take, misses the frame's colours by up to 3 levels."""
    return frame.format.name not in _QUICK_FORMATS and not frame.format.is_rgb


def conversion_of(frame: av.VideoFrame, stream: VideoStream) -> Conversion | None:
    """What turns a frame with HDR or wide primaries into sRGB; None for one that is shown as it is."""
    if frame.format.name.startswith("xyz"):  # of digital cinema, which swscale makes sRGB by itself
        return None
    context = stream.codec_context  # the decoder has put there what the frames say
    return to_srgb(int(context.color_trc), int(context.color_primaries), _peak(frame))


def is_interlaced(frame: av.VideoFrame, stream: VideoStream) -> bool:
    """Whether even and odd rows show different moments. Some codecs leave it to the container to say."""
    context = stream.codec_context
    order = getattr(context, "field_order", 0)  # PyAV 17 does not say it
    return frame.interlaced_frame or (context.name not in _TELLING_CODECS and order > _PROGRESSIVE)


def _peak(frame: av.VideoFrame) -> int:
    """Full signal in the 16 bits that swscale gives: it shifts full ranges, and scales others to 255 << 8."""
    name = frame.format.name
    if frame.color_range != ColorRange.JPEG and not frame.format.is_rgb and not name.startswith("yuvj"):
        return 255 << 8
    bits = frame.format.components[0].bits
    return ((1 << bits) - 1) << (16 - bits)


def display_matrix(frame: av.VideoFrame) -> Matrix:
    """How to turn and mirror a frame, which neither FFmpeg nor PyAV does.

    Reading it keeps the frame alive until Python collects its cycles.
    """
    content: Any = frame.side_data.get("DISPLAYMATRIX")
    if content is None:
        return IDENTITY
    a, b, _, c, d = (int(v) for v in np.frombuffer(content, np.int32)[:5])
    return a, b, c, d


def upright(pixels: np.ndarray, matrix: Matrix) -> np.ndarray:
    """The pixels turned and mirrored. Files only have quarter turns and mirror images."""
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
