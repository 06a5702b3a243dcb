"""Stills, and the animations that FFmpeg does not read: JPEG by simplejpeg, the rest by Pillow."""

from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from sat_ext.data.decode.pick import Picked, Size, pick
from sat_ext.data.decode.rgb import IDENTITY, Matrix, upright
from sat_ext.data.decode.srgb import is_srgb, to_rgb
from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError
from sat_ext.media import SIDEWAYS, frames_of, open_image, orientation_of

_END = b"\xff\xd9"  # of a JPEG

# EXIF's orientations as display matrices.
_ORIENTATIONS: dict[int, Matrix] = {
    **{2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1)},
    **{5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)},
}


def read_still(path: str, *, fit: Fit) -> np.ndarray:
    """An image in sRGB, upright by its EXIF data, flattened on white and fitted, as uint8 (1, 3, height, width).

    A JPEG is decoded no larger than `fit` needs. Of an animation, the first frame. Raises `MediaError` for a file
    that is missing, damaged, of no known format, larger than `MAX_PIXELS`, or outside of which `fit` would crop.
    """
    with open_image(path) as image:
        # Read before the pixels, as `probe` does: a PNG may have other EXIF data after them.
        orientation = orientation_of(image)
        shown = None
        if isinstance(image, JpegImageFile):
            pixels, shown = _read_jpeg(path, image, fit, sideways=orientation in SIDEWAYS)
        else:
            pixels = np.asarray(to_rgb(image))
        picked = Picked(path, 1, fit)
        picked.keep(upright(pixels, _ORIENTATIONS.get(orientation, IDENTITY)), shown, [0])
        return picked.frames


def read_animated_webp(path: str, times: Sequence[float], fit: Fit) -> np.ndarray:
    """As `read_frames`."""
    with open_image(path) as image:
        frames = ((frame.info.get("timestamp", 0) / 1000, frame.copy()) for frame in frames_of(image))
        return pick(path, frames, times, lambda frame: (np.asarray(to_rgb(frame)), None), fit)


def _read_jpeg(path: str, image: JpegImageFile, fit: Fit, *, sideways: bool) -> tuple[np.ndarray, Size | None]:
    """The pixels as stored, uint8 (H, W, 3), and the size as displayed if they were decoded smaller."""
    assert image.fp is not None  # it is open
    image.fp.seek(0)
    data = image.fp.read()
    profile = image.info.get("icc_profile")
    space = "RGB"
    if image.mode == "L" and profile is not None:
        space = "GRAY"  # which is what its profile is for
    elif image.mode not in ("L", "RGB"):
        space = "CMYK"
    factor = _factor(image, fit, sideways) if space != "CMYK" else 1
    pixels = _decode(path, data, space, -(-image.width // factor), -(-image.height // factor))
    if pixels is None or space == "CMYK":  # Pillow knows which of them are stored inverted
        return np.asarray(to_rgb(image)), None
    if space == "GRAY" or not is_srgb(profile):
        plain = Image.fromarray(pixels[..., 0] if space == "GRAY" else pixels)
        plain.info["icc_profile"] = profile
        pixels = np.asarray(to_rgb(plain))
    return pixels, (image.size[::-1] if sideways else image.size) if factor > 1 else None


def _factor(image: JpegImageFile, fit: Fit, sideways: bool) -> int:
    """The factor by which a JPEG may be decoded smaller: 1, 2, 4 or 8, as libjpeg's others are slow."""
    enough = fit.least(*(image.size[::-1] if sideways else image.size))
    if enough is None:
        return 1
    width, height = enough[::-1] if sideways else enough
    return max(f for f in (1, 2, 4, 8) if f == 1 or f <= min(image.width // width, image.height // height))


def _decode(path: str, data: bytes, space: str, width: int, height: int) -> np.ndarray | None:
    """The picture by simplejpeg, of this size at least; None if it cannot read this kind. `MediaError` for damage.

    libjpeg invents what damaged data does not give, and warns; Pillow suppresses the warning.
    """
    try:
        return simplejpeg.decode_jpeg(data, space, min_width=width, min_height=height)
    except ValueError as error:
        reason = str(error)
        truncated = "Premature end of JPEG" in reason
        if truncated and not data.endswith(_END):
            return _decode(path, data + _END, space, width, height)  # nothing else may be missing
        if _is_padding(data, reason):
            return simplejpeg.decode_jpeg(data, space, strict=False, min_width=width, min_height=height)
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
