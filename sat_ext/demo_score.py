"""What a person would judge of a sample of the demo's model, measured from its pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from sat_ext.demo_data import BACKGROUNDS, COLOURS, MOTIONS
from sat_ext.errors import DataError

LEAST_CONTRAST = 30.0  # in RGB: the demo's colours differ by more than 100 from its backgrounds
CAPTION = re.compile(r"an? (\w+) (\w+)(?: moving (\w+))? on (\w+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is in a clip or still; None: nothing. `direction` is None in a still."""

    colour: str | None
    background: str
    shape: str | None
    direction: str | None


def described(caption: str) -> Seen:
    """What a caption of the demo asks for. Raises `DataError` for another caption."""
    match = CAPTION.fullmatch(caption)
    if match is None:
        raise DataError(f"{caption!r} is no caption of the demo's data (sat-ext demo), which alone can be scored.")
    colour, shape, direction, background = match.groups()
    return Seen(colour=colour, background=background, shape=shape, direction=direction)


def right_in(samples: Sequence[tuple[str, np.ndarray]]) -> dict[str, int]:
    """How many of these captions and their pixels, as in `seen_in`, there are, and how many show the right colour,
    background, shape and, of clips, direction."""
    pairs = [(described(caption), seen_in(pixels)) for caption, pixels in samples]
    asked = [f.name for f in fields(Seen) if any(getattr(wanted, f.name) for wanted, _ in pairs)]
    right = {name: sum(getattr(w, name) == getattr(s, name) for w, s in pairs) for name in asked}
    return {"samples": len(pairs), **right}


def seen_in(pixels: np.ndarray) -> Seen:
    """What `pixels`, uint8 RGB (T, H, W, 3), show.

    The background is the colour of the frame's edge, and the shape what is nearer to its own colour than to that.
    Where nothing differs visibly from it, there is none. Its kind is the template of the same area and centre that
    overlaps it best, its direction the main axis of the path of its centre."""
    pixels = pixels.astype(np.float64)
    edge = np.concatenate([pixels[:, (0, -1)].reshape(-1, 3), pixels[:, :, (0, -1)].reshape(-1, 3)])
    background = np.median(edge, axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    farthest = np.quantile(distance, 0.97, axis=(1, 2), keepdims=True)  # a shape is a tenth of a frame or more
    if farthest.max() < LEAST_CONTRAST:
        return Seen(colour=None, background=_nearest(background, BACKGROUNDS), shape=None, direction=None)
    masks = distance > farthest / 2
    colour = np.median(pixels[distance > farthest * 0.8], axis=0)
    centres = [_centre(mask) for mask in masks]
    across, down = np.subtract(centres[-1], centres[0])
    sideways = abs(across) > abs(down)
    step = (int(np.sign(across)), 0) if sideways else (0, int(np.sign(down)))
    directions = [name for name, motion in MOTIONS.items() if motion == step and len(pixels) > 1]
    return Seen(
        colour=_nearest(colour, COLOURS),
        background=_nearest(background, BACKGROUNDS),
        shape=max(TEMPLATES, key=lambda shape: sum(_overlap(mask, shape) for mask in masks)),
        direction=directions[0] if directions else None,
    )


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(colour - names[name])))


def _centre(mask: np.ndarray) -> tuple[float, float]:
    """Of the pixels of a shape, (x, y); the middle of the frame where there are none."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    return (float(columns.mean()), float(rows.mean())) if len(rows) else (width / 2, height / 2)


def _overlap(mask: np.ndarray, shape: str) -> float:
    """Intersection over union of a mask and the template of its area and centre."""
    x, y = _centre(mask)
    rows, columns = np.indices(mask.shape)
    template = TEMPLATES[shape](columns - x, rows - y, mask.sum())
    return float((mask & template).sum() / max(1, (mask | template).sum()))


def _circle(x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    return x**2 + y**2 <= area / np.pi


def _square(x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= np.sqrt(area) / 2


def _triangle(x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    """As wide as high, the point up; the centre of its area is a third above its base."""
    side = np.sqrt(2 * area)
    return (y <= side / 3) & (abs(x) <= (y + side * 2 / 3) / 2)


TEMPLATES = {"circle": _circle, "square": _square, "triangle": _triangle}
