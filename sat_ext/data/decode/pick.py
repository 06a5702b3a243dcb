"""Selects the frames on display at given times, whatever the decoder."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sat_ext.errors import MediaError
from sat_ext.types import TIME_TOLERANCE

# Turns one decoded frame, uint8 (H, W, 3), into what is kept of it, of one shape for every frame of a clip. The
# second argument is the frame's (width, height) as displayed, if that is not (W, H).
Shape = Callable[[np.ndarray, "tuple[int, int] | None"], np.ndarray]


class Picked:
    """The array of all wanted frames, allocated with the shape of the first one."""

    def __init__(self, path: str, count: int) -> None:
        self._path, self._count = path, count
        self._out: np.ndarray | None = None
        self._size: tuple[int, ...] = ()

    def keep(self, pixels: np.ndarray, shaped: np.ndarray, places: Sequence[int]) -> None:
        """Put `shaped`, made of a decoded frame of `pixels`, at `places`. Raises `MediaError` on a new size."""
        if self._out is None:
            self._out, self._size = np.empty((self._count, *shaped.shape), np.uint8), pixels.shape
        if pixels.shape != self._size:
            height, width = self._size[:2]
            raise MediaError(self._path, f"its frames change size, from {width}x{height}")
        for place in places:
            np.copyto(self._out[place], shaped)

    def array(self) -> np.ndarray:
        """All frames, once each place was filled."""
        assert self._out is not None
        return self._out


def pick(
    path: str,
    frames: Iterable[tuple[float, Any]],
    times: Sequence[float],
    convert: Callable[[Any], tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """The frames on display at `times`, out of (start in seconds, frame) in order of display.

    Stops after the first frame behind the latest time. Only wanted frames are converted, one at a time: to their
    pixels (H, W, 3), and to what is kept of these.
    """
    order = sorted(range(len(times)), key=times.__getitem__)
    picked = Picked(path, len(times))
    shown: Any = None
    for start, frame in frames:
        due = [i for i in order if times[i] + TIME_TOLERANCE < start] if shown is not None else []
        if due:
            picked.keep(*convert(shown), due)
            order = order[len(due) :]
            if not order:
                break
        shown = frame
    if shown is None:
        raise MediaError(path, "no frame can be decoded")
    if order:
        picked.keep(*convert(shown), order)
    return picked.array()
