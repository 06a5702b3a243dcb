"""Which packets, in decoding order, are needed, and which of their frames come out damaged. Only numbers."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence

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

    def is_on_display(self, pts: int) -> bool:
        """Whether one of the times may fall on the frame that starts at `pts`."""
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
