"""Which packets and frames of a clip are wanted, and which come out damaged, whatever the decoder."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError
from sat_ext.types import TIME_TOLERANCE

Size = tuple[int, int]  # width and height


class Picked:
    """Wanted frames, uint8 (`count`, 3, height, width), fitted one by one: at full size they take gigabytes."""

    def __init__(self, path: str, count: int, fit: Fit) -> None:
        self._path, self._count, self._fit = path, count, fit
        self._size: tuple[int, ...] = ()
        self.frames = np.empty(0, np.uint8)

    def keep(self, pixels: np.ndarray, shown: Size | None, places: Sequence[int]) -> None:
        """Put a decoded frame at `places`. Raises `MediaError` for a new size, or a crop outside the frame."""
        try:
            fitted = self._fit(pixels, shown).numpy()
        except ValueError as error:
            raise MediaError(self._path, str(error)) from error
        if not self._size:  # a clip's own size is known with its first frame: headers may say another
            self._size, self.frames = pixels.shape, np.empty((self._count, *fitted.shape), np.uint8)
        if pixels.shape != self._size:
            height, width = self._size[:2]
            raise MediaError(self._path, f"its frames change size, from {width}x{height}")
        for place in places:
            np.copyto(self.frames[place], fitted)  # in half of torch's time, as `fitted` is not contiguous


def pick(
    path: str,
    frames: Iterable[tuple[float, Any]],
    times: Sequence[float],
    convert: Callable[[Any], tuple[np.ndarray, Size | None]],
    fit: Fit,
) -> np.ndarray:
    """The frames on display at `times`, out of (start in seconds, frame) in order of display.

    Stops after the first frame behind the latest time. Only wanted frames are converted, to their pixels (H, W, 3)
    and their displayed size, as `fit` takes them.
    """
    order = sorted(range(len(times)), key=times.__getitem__)
    picked = Picked(path, len(times), fit)
    shown: Any = None
    for start, frame in frames:
        # How long a frame stays on display is known only once the next one starts.
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
    return picked.frames


DEEPEST_REORDER = 16  # frames that a decoder may keep back; H.264 and HEVC set this limit


class Needed:
    """Which packets hold a frame that is on display at one of `times` (ascending, in the packets' clock).

    A frame is on display until the next one starts, which may come later in decoding order, so a packet is judged
    once some that follow it are known. Unknown packets can only shorten a frame's time: the judgement may skip too
    few frames, never too many.

    >>> needed = Needed([5, 6, 12])
    >>> for pts in (0, 8, 4, 2, 6):
    ...     needed.add(pts)
    >>> [pts for pts in (0, 2, 4, 6, 8) if needed.is_on_display(pts)]
    [4, 6, 8]
    >>> needed.is_complete  # 12 lies behind all of them
    False
    """

    def __init__(self, times: Sequence[float]) -> None:
        self._times = times
        self._starts: list[int] = []
        self._behind = 0

    def add(self, pts: int) -> None:
        """Note a packet whose frame will be displayed at `pts`."""
        insort(self._starts, pts)
        self._behind += pts > self._times[-1]

    def is_on_display(self, pts: int | None) -> bool:
        """Whether one of the times may fall on the frame that starts at `pts`; without a start, any may."""
        if pts is None:
            return True
        after = bisect_right(self._starts, pts)
        first = bisect_left(self._times, pts)
        if first == len(self._times):
            return False
        return after == len(self._starts) or self._times[first] < self._starts[after]

    @property
    def is_complete(self) -> bool:
        """Whether no later packet can be displayed before the last time: none is overtaken by so many."""
        return self._behind > DEEPEST_REORDER


class Damage:
    """Which frames are damaged, themselves or through the frames they refer to.

    FFmpeg conceals errors and marks only the frame that has them. Others refer to it, up to the next key frame,
    and B-frames are displayed before it. So a frame is settled only when all that were decoded before it have come
    out.
    """

    def __init__(self) -> None:
        self._sent = 0
        self._inside: dict[int, int] = {}  # by pts: the places in decoding order of what has not come out
        self._corrupt: list[int] = []
        self._key = 0  # the place of the last key frame displayed

    def send(self, pts: int | None) -> None:
        """A packet goes into the decoder."""
        self._sent += 1
        if pts is not None:
            self._inside[pts] = self._sent

    def receive(self, pts: int | None, *, is_corrupt: bool) -> int:
        """A frame comes out: its place in decoding order."""
        place = self._sent
        if pts is not None:
            place = self._inside.get(pts, place)
            # Frames come out in order of display: what is older and still inside was dropped.
            self._inside = {other: n for other, n in self._inside.items() if other > pts}
        if is_corrupt:
            self._corrupt.append(place)
        return place

    def is_settled(self, place: int) -> bool:
        """Whether all that was decoded before has come out."""
        return all(n > place for n in self._inside.values())

    def reaches(self, place: int, *, is_key: bool) -> bool:
        """Whether the frame is damaged. To be asked in order of display."""
        if is_key:
            self._key = place
        return any(self._key <= n <= place for n in self._corrupt)
