"""Opens media files for the stages of the data path, with `MediaError` for whatever fails, and writes clips."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from sat_ext.colour import UNREADABLE_MATRICES
from sat_ext.errors import MediaError, SatExtError
from sat_ext.files import is_local, open_binary, require_file, suffix_of
from sat_ext.types import IMAGE_EXTENSIONS, MAX_PIXELS

# FFmpeg's log lock can deadlock threads, and errors are raised here anyway.
av.logging.set_level(None)
# Images that are too large are refused below, by `MAX_PIXELS`.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Containers whose presentation times cannot be trusted: FFmpeg guesses them (AVI), or gets those of key frames
# wrong (MPEG program streams). We count their frames instead, at an even rate.
UNTIMED_FORMATS = frozenset({"avi", "mpeg"})

# The containers that may be opened. FFmpeg knows more, and some of them are playlists (HLS, DASH, concat) that
# would make it open whatever other files and addresses they name.
_DEMUXERS = (
    *("mov", "matroska", "avi", "flv", "asf", "mpeg", "mpegts", "mpegvideo", "gif", "apng", "ogg", "mxf", "nut"),
    *("ivf", "obu", "h264", "hevc", "m4v", "dv", "rm", "yuv4mpegpipe"),
    *("jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe"),
)

# ISO/IEC 23008-12: stills in the container of MP4; "mif1" is any codec's.
_HEIF_BRANDS = frozenset({"heic", "heix", "heim", "heis", "mif1", "mif2", "avif"})

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

_STREAMS = 32  # `max_pixels` is set for so many streams of a file, as the first is not always the video

_EXIF_ORIENTATION = 0x0112
SIDEWAYS = frozenset({5, 6, 7, 8})

# Headers of these name every stream, so no packets need to be read to find them.
_FULL_HEADERS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm"})


@contextmanager
def open_video(path: str, *, headers_only: bool = False) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream (of several, the one that players choose), with one decoding thread.

    Raises `MediaError`, also for errors of FFmpeg inside the `with` block. FFmpeg decodes a few frames when it
    opens a file, to learn what the headers do not say, above all how far B-frames reach; without that the first
    frames may come out of order. `headers_only` skips it: 3 ms instead of 30."""
    if is_local(path):
        require_file(path)
    try:
        with ExitStack() as stack:
            container = _open_container(path, headers_only, stack)
            if container.metadata.get("major_brand") in _HEIF_BRANDS:
                # FFmpeg exposes each tile as a stream, so we would read only the first tile.
                raise MediaError(path, "a HEIF or AVIF picture and not a video; name it .heic or .avif")
            streams = _streams(container)
            if headers_only and len(streams) > 1:
                # FFmpeg ranks streams by their first frames too: without them, `probe` and the decoders could
                # choose different streams.
                container = _open_container(path, False, stack)
                streams = _streams(container)
            if not streams:
                raise MediaError(path, "no video stream")
            best = container.streams.best("video")
            stream = next((s for s in streams if s is best), streams[0])
            context = stream.codec_context
            if context is None:
                raise MediaError(path, "no decoder for its video stream")
            if context.width * context.height > MAX_PIXELS:
                size = f"{context.width}x{context.height} pixels"
                raise MediaError(path, f"{size}, over the limit of {MAX_PIXELS}; scale it down")
            context.options = {"max_pixels": str(MAX_PIXELS)}  # a frame's own header may declare another size
            context.skip_frame = "DEFAULT"  # `headers_only` had set it
            context.thread_count = 1  # the data workers are the parallelism
            yield container, stream
    except av.FFmpegError as error:
        raise MediaError(path, f"not a readable video: {error.strerror}") from error


def _streams(container: InputContainer) -> list[VideoStream]:
    """Its video streams without cover art."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def decoder_of(path: str, stream: VideoStream) -> VideoCodecContext:
    """The stream's own decoder, except for VP8 and VP9 with alpha, which FFmpeg's native decoders drop. Raises
    `MediaError` if this FFmpeg has no other."""
    own = stream.codec_context
    name = _ALPHA_DECODERS.get(own.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return own
    try:
        context = av.CodecContext.create(name, "r")
    except ValueError:  # an unknown codec
        raise MediaError(path, f"this FFmpeg drops its transparency (it has no {name}); flatten it") from None
    assert isinstance(context, VideoCodecContext)
    context.options, context.thread_count = own.options, own.thread_count
    return context


def displayed_size(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Width and height in square pixels after rotation, known once a frame of the stream was decoded."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    # Beyond 8 to 1 the muxer is wrong: real ones end at 4 (anamorphic DV in half-width formats).
    width = round(frame.width * ratio) if ratio and 1 / 8 <= ratio <= 8 else frame.width
    return (frame.height, width) if round(frame.rotation / 90) % 2 else (width, frame.height)


def refuse_unreadable_colours(path: str, frame: av.VideoFrame) -> None:
    """Raise `MediaError` for a frame whose colours would be converted wrongly."""
    kind = UNREADABLE_MATRICES.get(int(frame.colorspace))
    if kind is not None:
        raise MediaError(path, f"its colours are {kind}, which FFmpeg cannot turn into RGB; convert it to BT.709")


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """The image, not yet decoded. Raises `MediaError`, also for what goes wrong inside the `with` block."""
    try:
        with open_binary(path) as file, Image.open(file, formats=image_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(path, f"{image.width}x{image.height} pixels, over the limit of {MAX_PIXELS}")
            if image.format == "TIFF":
                image.info.pop("xmp", None)  # Pillow would rotate the pixels by it, but not the size
            yield image
    except SatExtError:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search("[0-9]+", str(error))  # Pillow's own limit, which comes before ours
        size = f"{pixels[0]} pixels" if pixels else "too many pixels"
        raise MediaError(path, f"{size}, over the limit of {MAX_PIXELS}") from error
    except UnidentifiedImageError as error:
        reason = "not a readable image: unknown format"
        with open_binary(path) as file:
            if "HEIF" not in image_formats() and file.read(12)[4:8] == b"ftyp":
                reason = "HEIC is read by pillow-heif alone; pip install 'sat_ext[heif]', or convert it to JPEG"
        raise MediaError(path, reason) from error
    except Exception as error:  # Pillow's parsers raise anything on broken files
        raise MediaError(path, f"not a readable image: {str(error) or type(error).__name__}") from error


def frames_of(image: Image.Image) -> Iterator[Image.Image]:
    """The frames of an open animation, decoded one after another into `image` itself."""
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        image.load()
        yield image


def write_video(path: Path, frames: Sequence[np.ndarray], fps: int, *, crf: int) -> None:
    """uint8 frames (H, W, 3) as H.264 in MP4, as cameras and sites write it; a lower `crf` is better."""
    with av.open(str(path), "w", format="mp4") as container:
        # threads: with more than one, the bytes differ from run to run
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.codec_context.gop_size = fps
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def is_webp(path: str) -> bool:
    """Whether a picture is WebP, whatever its suffix. Raises `MediaError` if it is missing."""
    if suffix_of(path) not in IMAGE_EXTENSIONS:
        return False
    with open_binary(path) as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


@lru_cache(maxsize=1)
def image_formats() -> tuple[str, ...]:
    """The formats of stills that we read, by Pillow's names.

    No others, whatever the suffix: some run programs (EPS runs Ghostscript) or read files beside them."""
    formats = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF")
    try:
        import pillow_heif
    except ImportError:
        return formats
    pillow_heif.register_heif_opener()
    return (*formats, "HEIF")


def orientation_of(image: Image.Image) -> Any:
    """How to turn an image that was just opened, by the EXIF data before its pixels.

    1 is not at all, and `SIDEWAYS` swap width and height; in a broken file it may be anything. Data after the
    pixels (PNG allows it) is ignored, as in browsers: `probe` would have to read the whole file."""
    if image.format == "TIFF":  # Pillow already turns these
        return 1
    # The base class's method: PNG's own would decode the whole image to find EXIF data after it.
    return Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)


def _open_container(path: str, headers_only: bool, stack: ExitStack) -> InputContainer:
    # An absolute path, because "a:b.mp4" would be taken for a protocol.
    file: Any = os.path.abspath(path) if is_local(path) else stack.enter_context(open_binary(path))
    options = {"format_whitelist": ",".join(_DEMUXERS), "protocol_whitelist": "file"}
    decoder = {"max_pixels": str(MAX_PIXELS)}
    limit = {}
    if headers_only:
        decoder["skip_frame"] = "all"
        # Without a limit, FFmpeg reads a megabyte to find the pixel format, which decoding will show.
        limit = {"probesize": "4096"} if suffix_of(path) in _FULL_HEADERS else {}
    streams: Any = [decoder] * _STREAMS
    try:
        return stack.enter_context(
            av.open(file, metadata_errors="replace", options=options | limit, stream_options=streams)
        )
    except av.FFmpegError:
        raise
    except ValueError:  # MPEG program streams and FLV list no streams until frames were read
        if not isinstance(file, str):
            file.seek(0)
    return stack.enter_context(av.open(file, metadata_errors="replace", options=options))
