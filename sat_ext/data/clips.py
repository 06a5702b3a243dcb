"""Which moments of a clip to show: samplers by name, and repeats for clips that are too short. Pure arithmetic.

Time 0 is the start of the file's first frame; at time t a decoder shows the last frame that starts at or before
t + `TIME_TOLERANCE`. Unlike frame numbers, times in seconds keep the speed right at every frame rate, constant or
not: a 25 fps clip at 8 fps takes frames 0, 3, 6, 9, 12, 15, 18, 21, 25, and lasts as long as before.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Literal, NamedTuple

import numpy as np

from sat_ext.config import convert, load_entry
from sat_ext.errors import ConfigError
from sat_ext.types import TIME_TOLERANCE, MediaInfo

MOST_RECORDS = 1 << 24  # of one clip, as each takes memory
_ROUNDING = 1e-6  # frames by which arithmetic may be off: a time on the very edge of a window is outside


class ClipTimes(NamedTuple):
    """What to decode: `times` in seconds, one per frame of the bucket, played at `fps`."""

    times: tuple[float, ...]
    num_frames: int  # without the repeats that fill a short clip
    fps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The part of a file that may be shown: `frames` source frames of `period` seconds, from `start` on."""

    start: float
    period: float
    frames: int
    number: int = 0  # of the record, where a sampler makes several `records` of one clip
    records: int = 1

    @property
    def length(self) -> float:
        """In seconds, to the end of the last frame."""
        return self.frames * self.period

    @property
    def last(self) -> float:
        """When the last source frame starts, in seconds after the window's start."""
        return (self.frames - 1) * self.period

    def inside(self, fps: float) -> int:
        """Frames at times k / fps that begin before the window ends, at least 1."""
        return max(1, math.ceil((self.length - TIME_TOLERANCE) * fps - _ROUNDING))

    def available(self, fps: float) -> int:
        """The longest bucket, in frames at times k / fps, that the window fills."""
        # The last time may follow the start of the last source frame by less than 1 / fps: it shows that frame,
        # which none before it does.
        behind = math.ceil((self.last - TIME_TOLERANCE) * fps - _ROUNDING) + 1
        # Or it may be the very end of the window, so that n seconds fill n * fps + 1 frames at every source rate.
        at_end = math.floor((self.length + TIME_TOLERANCE) * fps) + 1 if self.length else 1
        return max(behind, at_end, self.inside(fps))

    def run(self, first: float, frames: int, fps: float) -> list[float]:
        """`frames` times at `fps`, starting `first` seconds into the window."""
        return [self.start + first + k / fps for k in range(frames)]

    def starts(self, frames: int, fps: float) -> int:
        """The number of source frames, from the first on, at which `frames` frames can start."""
        room = self.length - (frames - 1) / fps - TIME_TOLERANCE
        return max(1, math.ceil(room / self.period - _ROUNDING)) if self.period > 0 else 1


# window, number of frames, frames a second, random numbers -> that many times, rising, inside the window
Pick = Callable[[Window, int, float, np.random.Generator], Sequence[float]]
CountRecords = Callable[[Window, int, float], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A registered sampler."""

    pick: Pick
    still: bool = False  # gives single frames
    whole: bool = False  # `skip_frms_num` does not apply to it
    records: CountRecords | None = None  # how many it makes of a window, given frames and fps; None: one


SAMPLERS: dict[str, Sampler] = {}


def register_sampler(
    name: str, *, still: bool = False, whole: bool = False, records: CountRecords | None = None
) -> Callable[[Pick], Pick]:
    """Decorator: register a function as a sampler; the arguments are `Sampler`'s.

    The function gets a window, the number of frames (never more than the window gives), frames a second and a
    random generator, and returns that many rising times in seconds, from the window's start to its end (or to
    start + (frames - 1) / fps, if that is later). Listed as an entry point of your package it is loaded by name:
    `[project.entry-points."sat_ext.samplers"]`, `ending = "my_package:ending"`.

    >>> @register_sampler("ending")
    ... def ending(window, frames, fps, rng):
    ...     return window.run((window.starts(frames, fps) - 1) * window.period, frames, fps)
    >>> clip = Window(start=0.0, period=1 / 8, frames=80)
    >>> find_sampler("ending").pick(clip, 5, 8, np.random.default_rng(0))
    [9.375, 9.5, 9.625, 9.75, 9.875]
    >>> del SAMPLERS["ending"]
    """

    def register(pick: Pick) -> Pick:
        SAMPLERS[name] = Sampler(pick=pick, still=still, whole=whole, records=records)
        return pick

    return register


def find_sampler(name: str, where: str = "sampler") -> Sampler:
    """The sampler of that name, loaded from its package if an entry point names it.

    Raises `ConfigError`, which begins with `where`, for an unknown name, and if the package cannot be imported.
    """
    if name not in SAMPLERS:
        points = entry_points(group="sat_ext.samplers")
        known = (*SAMPLERS, *sorted(points.names))
        convert(Literal[known], name, where)  # raises with the nearest name
        pick = load_entry(points[name], where)
        SAMPLERS.setdefault(name, Sampler(pick=pick))  # unless the package has used the decorator
    return SAMPLERS[name]


@register_sampler("random_start")
def random_start(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """From anywhere in the clip, at its own speed: all source frames that can be the first are equally likely.

    Of 61 frames at 30 fps, 9 at 8 fps span 30 frames, so the first may be 0, 1, ... 30; here it is 26:

    >>> clip = Window(start=0.0, period=1 / 30, frames=61)
    >>> [round(30 * t) for t in random_start(clip, 9, 8, np.random.default_rng(0))]
    [26, 30, 34, 37, 41, 45, 48, 52, 56]
    """
    return window.run(int(rng.integers(window.starts(frames, fps))) * window.period, frames, fps)


@register_sampler("first_frame", still=True, whole=True)
@register_sampler("start")
def start(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """From the first frame at the clip's own speed; as "first_frame" a still, of frames that are trimmed too."""
    return window.run(0.0, frames, fps)


@register_sampler("middle")
def middle(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """The middle of the clip, at its own speed."""
    return window.run((window.starts(frames, fps) - 1) // 2 * window.period, frames, fps)


@register_sampler("uniform")
def uniform(window: Window, frames: int, fps: float, rng: np.random.Generator) -> Sequence[float]:
    """The whole clip from its first frame to its last in even steps, so that a long one plays faster."""
    if frames == 1 or window.last <= 0:
        return middle(window, frames, fps, rng)
    return [window.start + window.last * k / (frames - 1) for k in range(frames)]


@register_sampler("random_frame", still=True)
def random_frame(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """Any frame of the clip as a still, all equally likely, drawn again at every visit."""
    return window.run(int(rng.integers(window.frames)) * window.period, frames, fps)


def _windows(window: Window, frames: int, fps: float) -> int:
    # No more than source frames: a file may claim that each of them lasts for years.
    return max(1, min(window.inside(fps) // frames, window.frames))


@register_sampler("all_windows", records=_windows)
def all_windows(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """Every part of a long clip once an epoch: as many windows as fit side by side, each its own record.

    They are evenly spread, from the clip's start to its end, with gaps that together are shorter than one window:
    10 s at 8 fps have 80 frames, so four windows of 17 fit, with gaps of 0.5 s.

    >>> film = [Window(start=0.0, period=1 / 8, frames=80, number=i, records=4) for i in range(4)]
    >>> windows = [all_windows(window, 17, 8, np.random.default_rng(0)) for window in film]
    >>> [(times[0], times[-1]) for times in windows]  # the last frame of all is at 79/8 s
    [(0.0, 2.0), (2.625, 4.625), (5.25, 7.25), (7.875, 9.875)]
    """
    # A source slower than `fps` has too few frames to start from; then the windows are adjacent.
    latest = max((window.starts(frames, fps) - 1) * window.period, (window.records - 1) * frames / fps)
    return window.run(latest * window.number / max(1, window.records - 1), frames, fps)


def available_frames(info: MediaInfo, fps: float) -> int:
    """The length in frames of the longest bucket that the whole clip fills at `fps` frames a second.

    >>> clip = MediaInfo(width=720, height=480, frames=180, fps=30.0, duration=6.0, codec="h264")
    >>> available_frames(clip, 8)  # 0/8 s, 1/8 s, ... 47/8 s, and the last source frame, at 179/30 s, for 48/8 s
    49
    """
    return _whole(info).available(fps)


def records_of(sampler: str, info: MediaInfo, *, frames: int, fps: float, skip_frames: float = 0) -> int:
    """How many records one file makes in a bucket of `frames` frames: 1, except with `all_windows`.

    Raises `ConfigError` for an unknown name, and for an invalid number from a sampler of the user's own.

    >>> clip = MediaInfo(width=96, height=96, frames=300, fps=30.0, duration=10.0, codec="h264")
    >>> [records_of("all_windows", clip, frames=n, fps=8) for n in (17, 33, 49, 97)]  # 80 frames at 8 fps
    [4, 2, 1, 1]
    """
    found = find_sampler(sampler)
    if found.records is None:
        return 1
    count = found.records(_window(info, 0 if found.whole else skip_frames, frames, fps), frames, fps)
    if not isinstance(count, (int, np.integer)) or not 1 <= count <= MOST_RECORDS:
        raise ConfigError(f"sampler: '{sampler}' makes {count!r} records of a clip; make it 1 to {MOST_RECORDS}.")
    return int(count)


def sample_times(
    sampler: str,
    *,
    info: MediaInfo,
    frames: int,
    fps: float,
    rng: np.random.Generator,
    short: str,
    skip_frames: float = 0,
    window: int = 0,
) -> ClipTimes:
    """The times of `frames` frames at `fps` frames a second, by the sampler of that name.

    `skip_frames` source frames are trimmed from both ends, but no more than let the clip fill its bucket. `window`
    is which of its `records_of` records to show. A clip that does not fill its bucket (see `available_frames`)
    starts over or repeats its last frame, as `short` says: "loop" or "pad_last". Raises `ConfigError` for an
    unknown name, and for invalid times from a sampler of the user's own.
    """
    found = find_sampler(sampler)
    assert frames >= 1 and fps > 0 and (frames == 1 or not found.still)
    records = records_of(sampler, info, frames=frames, fps=fps, skip_frames=skip_frames)
    assert 0 <= window < records, f"window {window} of {records}"
    part = _window(info, 0 if found.whole else skip_frames, frames, fps)
    part = replace(part, number=window, records=records)
    real = frames if part.available(fps) >= frames else part.inside(fps)
    times = [round(float(t), 9) for t in found.pick(part, real, fps, rng)]
    end = part.start + max(part.length, (real - 1) / fps)
    rising = all(a < b for a, b in zip(times, times[1:]))
    if len(times) != real or not rising or not part.start - 1e-6 <= times[0] <= times[-1] <= end + 1e-6:
        raise ConfigError(
            f"sampler: '{sampler}' gave the times {[round(t, 3) for t in times]} for {real} frames; fix it, so "
            f"that as many rise from {part.start:.3f} s to at most {end:.3f} s."
        )
    rate = round((real - 1) / (times[-1] - times[0]), 6) if real > 1 else fps
    # After the last source frame, a time at which that frame is still on display.
    latest = part.start + max(part.last, part.length - 2 * TIME_TOLERANCE)
    times = [round(min(t, latest), 9) for t in times]
    if real < frames:
        assert short in ("loop", "pad_last"), "a clip too short for its bucket, and no policy that fills it"
        times = [times[i % real if short == "loop" else min(i, real - 1)] for i in range(frames)]
    return ClipTimes(tuple(times), num_frames=real, fps=max(1, math.floor(rate + 0.5)))


def _whole(info: MediaInfo) -> Window:
    if info.frames == 1 or info.duration <= 0:
        return Window(start=0.0, period=0.0, frames=1)
    # the mean period if the rate varies
    return Window(start=0.0, period=info.duration / info.frames, frames=info.frames)


def _window(info: MediaInfo, skip_frames: float, frames: int, fps: float) -> Window:
    whole = _whole(info)
    most = min(int(skip_frames), (whole.frames - 1) // 2)

    def without(skip: int) -> Window:
        return replace(whole, start=skip * whole.period, frames=whole.frames - 2 * skip)

    def is_too_much(skip: int) -> bool:
        part = without(skip)
        # one source frame can last as long as the bucket, but would be a still
        return part.available(fps) < frames or part.frames < min(frames, 2)

    # a clip that is too short for its bucket anyway is filled with repeats, so it can be trimmed fully
    return without(most if is_too_much(0) else bisect_left(range(1, most + 1), True, key=is_too_much))
