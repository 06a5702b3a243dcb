"""Small pictures inside the page, as data: URIs."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

QUALITY = 72  # WebP's, of 100: at these sizes its faults are below what the eye finds
_METHOD = 4  # WebP's effort, of 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """`uri` holds the bytes; `width` and `height` are those of the file, for the browser to reserve the place."""

    uri: str
    width: int
    height: int


def picture(pixels: np.ndarray, longest: int) -> Picture:
    """uint8 (H, W, 3) as WebP, its longer side at most `longest` pixels. Smaller ones are enlarged."""
    image = Image.fromarray(pixels)
    side = max(image.size)
    if side > longest:
        size = [max(1, round(s * longest / side)) for s in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    elif longest // side > 1:  # what the model sees of a tiny bucket are its pixels, not a blur
        factor = longest // side
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=QUALITY, method=_METHOD)
    return Picture(
        uri="data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii"),
        width=image.width,
        height=image.height,
    )
