"""Stills, and the animations that FFmpeg does not read: JPEG by simplejpeg, the rest by Pillow."""

from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from sat_ext.data.decode.pick import Shape, pick
from sat_ext.data.decode.srgb import is_srgb, to_rgb
from sat_ext.errors import MediaError
from sat_ext.media import SIDEWAYS, frames_of, open_image, orientation_of

_END = b"\xff\xd9"  # of a JPEG

Least = Callable[[int, int], "tuple[int, int] | None"]

# Turn stored pixels upright, by EXIF orientation.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def read_picture(path: str, shape: Shape, *, least: Least | None) -> np.ndarray:
    """See `read_still`; the picture after `shape`, with a first dimension of 1."""
    with open_image(path) as image:
        # Read before the pixels, as `probe` does: a PNG may have other EXIF data after them.
        orientation = orientation_of(image)
        shown = None
        if isinstance(image, JpegImageFile):
            pixels, shown = _read_jpeg(path, image, least, sideways=orientation in SIDEWAYS)
        else:
            pixels = np.asarray(to_rgb(image))
        if orientation in _UPRIGHT:
            pixels = np.ascontiguousarray(_UPRIGHT[orientation](pixels))
        return shape(pixels, shown)[None]


def _read_jpeg(
    path: str, image: JpegImageFile, least: Least | None, *, sideways: bool
) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The pixels as stored, uint8 (H, W, 3), and the displayed (width, height) if it was decoded smaller."""
    assert image.fp is not None  # it is open
    image.fp.seek(0)
    data = image.fp.read()
    profile = image.info.get("icc_profile")
    grey = image.mode == "L" and profile is not None  # whose profile is for greys
    factor = 1 if least is None else _factor(image, least, sideways)
    if image.mode in ("L", "RGB"):
        least_size = {"min_width": -(-image.width // factor), "min_height": -(-image.height // factor)}
        pixels = _decode(path, data, "GRAY" if grey else "RGB", **least_size)
    else:  # CMYK: Pillow knows which of them are stored inverted
        factor, pixels = 1, None
        _decode(path, data, "CMYK")
    if pixels is None:
        pixels = np.asarray(to_rgb(image))
    elif grey or not is_srgb(profile):
        plain = Image.fromarray(pixels[..., 0] if grey else pixels)
        plain.info["icc_profile"] = profile
        pixels = np.asarray(to_rgb(plain))
    return pixels, (image.size[::-1] if sideways else image.size) if factor > 1 else None


def _factor(image: JpegImageFile, least: Least, sideways: bool) -> int:
    """The factor by which a JPEG may be decoded smaller: 1, 2, 4 or 8, as libjpeg's others are slow."""
    enough = least(*(image.size[::-1] if sideways else image.size))
    if enough is None:
        return 1
    width, height = enough[::-1] if sideways else enough
    return max(f for f in (1, 2, 4, 8) if f == 1 or f <= min(image.width // width, image.height // height))


def _decode(path: str, data: bytes, space: str, **least_size: int) -> np.ndarray | None:
    """The picture by simplejpeg, None if it cannot read this kind. Raises `MediaError` for damage.

    libjpeg invents what damaged data does not give, and warns; Pillow suppresses the warning.
    """
    try:
        return simplejpeg.decode_jpeg(data, space, **least_size)
    except ValueError as error:
        reason = str(error)
        truncated = "Premature end of JPEG" in reason
        if truncated and not data.endswith(_END):
            return _decode(path, data + _END, space, **least_size)  # nothing else may be missing
        if _is_padding(data, reason):
            return simplejpeg.decode_jpeg(data, space, strict=False, **least_size)
        if not truncated and "Corrupt JPEG data" not in reason:
            return None
        what = "truncated" if truncated or "premature end" in reason else "damaged"
        raise MediaError(path, f"not a readable image: {what} ({reason})") from error


def _is_padding(data: bytes, reason: str) -> bool:
    """Whether the only damage is a run of equal bytes before the end, which some cameras write."""
    words = reason.split(" extraneous bytes before marker 0xd9")
    if len(words) == 1:
        return False
    end, count = data.rfind(_END), int(words[0].split()[-1])
    return 0 < count <= end and len(set(data[end - count : end])) == 1


def read_animated_webp(path: str, times: Sequence[float], shape: Shape) -> np.ndarray:
    """See `read_frames`."""

    def convert(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        pixels = np.asarray(to_rgb(image))
        return pixels, shape(pixels, None)

    with open_image(path) as image:
        frames = ((frame.info.get("timestamp", 0) / 1000, frame.copy()) for frame in frames_of(image))
        return pick(path, frames, times, convert)
