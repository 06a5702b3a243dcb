"""Pictures by Pillow: stills, and the animations that FFmpeg does not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from sat_ext.data.decode.pick import Shape, pick
from sat_ext.media import SIDEWAYS, open_image, orientation_of, to_rgb

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Least = Callable[[int, int], "tuple[int, int] | None"]


def read_picture(path: str, shape: Shape, *, least: Least | None, max_pixels: int) -> np.ndarray:
    """See `read_still`; what is left of the picture after `shape`, with a first dimension of 1."""
    with open_image(path, max_pixels=max_pixels) as image:
        shown = _decode_smaller(image, least) if least is not None and image.format == "JPEG" else None
        pixels = _decode_quickly(image) if shown is None else None
        if pixels is None:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.asarray(to_rgb(image))
        return shape(pixels, shown)[None]


def _decode_quickly(image: Image.Image) -> np.ndarray | None:
    """A plain JPEG by simplejpeg, where that is installed: the same pixels, without Pillow's copy of them.

    None for what Pillow has to decode, and for what is broken, which Pillow then says.
    """
    if simplejpeg is None or not isinstance(image, JpegImageFile) or image.format != "JPEG":
        return None
    if image.mode != "RGB" or "icc_profile" in image.info or orientation_of(image) != 1:
        return None
    assert image.fp is not None  # it is open
    image.fp.seek(0)
    try:
        return simplejpeg.decode_jpeg(image.fp.read(), "RGB")
    except ValueError:
        return None


def _decode_smaller(image: Image.Image, least: Least) -> tuple[int, int] | None:
    """Have a JPEG decoded at a part of its size, where that is enough; the size that it is displayed at."""
    sideways = orientation_of(image) in SIDEWAYS
    width, height = image.size[::-1] if sideways else image.size
    enough = least(width, height)
    if enough is None:
        return None
    image.draft(None, enough[::-1] if sideways else enough)
    return width, height


def read_animated_webp(path: str, times: Sequence[float], shape: Shape) -> np.ndarray:
    """See `read_frames`."""

    def frames(image: Image.Image) -> Iterator[tuple[float, Image.Image]]:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            yield image.info.get("timestamp", 0) / 1000, image.copy()

    def convert(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.asarray(to_rgb(image))
        return pixels, shape(pixels, None)

    with open_image(path) as image:
        return pick(path, frames(image), times, convert)
