"""Samplers by name: which times of a window, in seconds, to show.

A sampler of your own is a function of a `Window`, registered by name with `register_sampler` or by an entry
point in the group `sat_ext.samplers`:

    [project.entry-points."sat_ext.samplers"]
    ending = "my_package.samplers:ending"
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np

from sat_ext.errors import ConfigError
from sat_ext.types import TIME_TOLERANCE

ENTRY_POINT_GROUP = "sat_ext.samplers"
_ROUNDING = 1e-6  # frames by which arithmetic may be off: a time on the very edge of a window is outside


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The part of a file that may be shown: `frames` source frames of `period` seconds, from `start` on.

    If a sampler makes several records of one clip, this is record `number` of `records`.
    """

    start: float
    period: float
    frames: int
    number: int = 0
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
        """How many frames at times k / fps a bucket may have for the window to fill it.

        The last may come after the last source frame by less than 1 / fps, and then shows that frame, which none
        before it does. It may also be at the very end of the window, so that n seconds fill n * fps + 1 frames at
        every source rate.
        """
        behind = math.ceil((self.last - TIME_TOLERANCE) * fps - _ROUNDING) + 1
        at_end = math.floor((self.length + TIME_TOLERANCE) * fps) + 1 if self.length else 1
        return max(behind, at_end, self.inside(fps))

    def clamp(self, time: float) -> float:
        """The time; after the last source frame, a time at which that frame is on display."""
        return min(time, self.start + max(self.last, self.length - 2 * TIME_TOLERANCE))

    def run(self, first: float, frames: int, fps: float) -> list[float]:
        """`frames` times at `fps`, from `first` seconds into the window on."""
        return [self.start + first + k / fps for k in range(frames)]

    def starts(self, frames: int, fps: float) -> int:
        """The number of source frames, from the first on, at which `frames` frames can start."""
        room = self.length - (frames - 1) / fps - TIME_TOLERANCE
        return max(1, math.ceil(room / self.period - _ROUNDING)) if self.period > 0 else 1


# window, number of frames, frames a second, random numbers -> that many times, rising, inside the window
Pick = Callable[[Window, int, float, np.random.Generator], Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A registered sampler. `still`: it gives single frames. `whole`: `skip_frms_num` does not apply to it.
    `records`: how many records it makes of a window, given frames and fps; None for one."""

    pick: Pick
    still: bool = False
    whole: bool = False
    records: Callable[[Window, int, float], int] | None = None


SAMPLERS: dict[str, Sampler] = {}


def register_sampler(
    name: str,
    *,
    still: bool = False,
    whole: bool = False,
    records: Callable[[Window, int, float], int] | None = None,
) -> Callable[[Pick], Pick]:
    """Decorator: register a function as a sampler; the arguments are `Sampler`'s.

    The function gets a window, the number of frames (never more than the window gives), frames a second and a
    random generator, and returns that many rising times in seconds, from the window's start to its end (or to
    start + (frames - 1) / fps, if that is later). The decorator must run before the YAML is read; if data workers
    are spawned and not forked, use the entry point.

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


def find_sampler(name: str) -> Sampler:
    """The sampler of that name, loaded from its package if an entry point has it.

    Raises `ConfigError` for an unknown name, and if the package fails to load.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in points:
        valid = (*SAMPLERS, *sorted(points))
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"sampler: '{name}' is not known; {hint}valid: {', '.join(valid)}.")
    try:
        pick = points[name].load()
    except Exception as error:  # whatever another package's import raises
        raise ConfigError(
            f"sampler: '{name}' cannot be loaded from '{points[name].value}' ({type(error).__name__}: {error}); "
            "fix or remove that package."
        ) from error
    if name not in SAMPLERS and not callable(pick):
        raise ConfigError(
            f"sampler: '{name}' is the {type(pick).__name__} '{points[name].value}'; have its package name a "
            "function."
        )
    return SAMPLERS.setdefault(name, Sampler(pick=pick))  # the decorator may have put it there


def is_still_sampler(name: str) -> bool:
    """Whether the sampler gives single frames. Raises `ConfigError` for an unknown name."""
    return find_sampler(name).still


def _windows(window: Window, frames: int, fps: float) -> int:
    # No more than source frames: a file may claim that each of them lasts for years.
    return max(1, min(window.inside(fps) // frames, window.frames))


@register_sampler("random_start")
def random_start(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """From anywhere in the clip, at its own speed: all source frames that can be the first are equally likely.

    Of 61 frames at 30 fps, 9 at 8 fps span 30 frames, so the first may be 0, 1, ... 30; here it is 26:

    >>> clip = Window(start=0.0, period=1 / 30, frames=61)
    >>> clip.starts(9, 8)
    31
    >>> [round(30 * t) for t in random_start(clip, 9, 8, np.random.default_rng(0))]
    [26, 30, 34, 37, 41, 45, 48, 52, 56]
    """
    return window.run(int(rng.integers(window.starts(frames, fps))) * window.period, frames, fps)


@register_sampler("start")
def start(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """From the first frame after trimming, at the clip's own speed."""
    return window.run(0.0, frames, fps)


@register_sampler("middle")
def middle(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """The middle of the clip, at its own speed.

    Of 61 frames at 30 fps, 9 at 8 fps take one second (30 source frames), which leaves 15 at each end.

    >>> [round(t, 3) for t in middle(Window(start=0.0, period=1 / 30, frames=61), 9, 8, np.random.default_rng(0))]
    [0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375, 1.5]
    """
    return window.run((window.starts(frames, fps) - 1) // 2 * window.period, frames, fps)


@register_sampler("uniform")
def uniform(window: Window, frames: int, fps: float, rng: np.random.Generator) -> Sequence[float]:
    """The whole clip from its first frame to its last in even steps, so that a long one plays faster.

    >>> uniform(Window(start=0.0, period=1 / 30, frames=61), 5, 8, np.random.default_rng(0))  # at 2 fps, not 8
    [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    span = (window.frames - 1) * window.period
    if frames == 1 or span <= 0:
        return middle(window, frames, fps, rng)
    return [window.start + span * k / (frames - 1) for k in range(frames)]


@register_sampler("first_frame", still=True, whole=True)
def first_frame(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """The very first frame as a still, even if `skip_frms_num` trims it from clips."""
    return window.run(0.0, frames, fps)


@register_sampler("random_frame", still=True)
def random_frame(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """Any frame of the clip as a still, all equally likely, drawn again at every visit."""
    return window.run(int(rng.integers(window.frames)) * window.period, frames, fps)


@register_sampler("all_windows", records=_windows)
def all_windows(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """Every part of a long clip once an epoch: as many windows as fit side by side, each its own record.

    They are evenly spread: the first starts with the clip, the last ends with it, and the gaps together are
    shorter than one window. A clip with room for one gives its start. In a bucket of one frame (for short clips
    under `short_clips: shorter_bucket`) each frame is a window. There are never more windows than source frames.

    10 s at 8 fps are 80 frames, so four windows of 17 fit, and start 2.625 s apart, with gaps of 0.5 s:

    >>> film = [Window(start=0.0, period=1 / 8, frames=80, number=i, records=4) for i in range(4)]
    >>> windows = [all_windows(window, 17, 8, np.random.default_rng(0)) for window in film]
    >>> [(times[0], times[-1]) for times in windows]  # the last frame of all is at 79/8 s
    [(0.0, 2.0), (2.625, 4.625), (5.25, 7.25), (7.875, 9.875)]
    """
    if window.records == 1:
        return window.run(0.0, frames, fps)
    # A source slower than `fps` has too few frames to start from; then the windows are adjacent.
    latest = max((window.starts(frames, fps) - 1) * window.period, (window.records - 1) * frames / fps)
    return window.run(latest * window.number / (window.records - 1), frames, fps)
