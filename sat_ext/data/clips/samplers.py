"""Samplers by name: which times of a window, in seconds, to show.

A sampler of your own is a function of a `Window`, registered by name with `register_sampler` or by an entry
point in the group `sat_ext.samplers`:

    [project.entry-points."sat_ext.samplers"]
    ending = "my_package.samplers:ending"
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points

import numpy as np

from sat_ext.errors import ConfigError
from sat_ext.types import TIME_TOLERANCE

ENTRY_POINT_GROUP = "sat_ext.samplers"
_ROUNDING = 1e-6  # frames by which arithmetic may be off: a moment on the very edge of a window lies outside


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The part of the file that may be shown: `frames` source frames of `period` seconds from `start` on.

    Where a sampler makes several records of one clip, this is the record `number` of `records`.
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

        The last of them may lie behind the last source frame by less than 1 / fps: it shows that frame, which
        none before it does. And it may lie at the very end of the window, so that n seconds fill n * fps + 1
        frames at every source rate.
        """
        behind = math.ceil((self.last - TIME_TOLERANCE) * fps - _ROUNDING) + 1
        at_end = math.floor((self.length + TIME_TOLERANCE) * fps) + 1 if self.length else 1
        return max(behind, at_end, self.inside(fps))

    def clamp(self, time: float) -> float:
        """The time, or where it lies behind the last source frame, one at which that is on display."""
        return min(time, self.start + max(self.last, self.length - 2 * TIME_TOLERANCE))

    def run(self, first: float, frames: int, fps: float) -> list[float]:
        """`frames` times at `fps`, from `first` seconds into the window on."""
        return [self.start + first + k / fps for k in range(frames)]

    def starts(self, frames: int, fps: float) -> int:
        """From how many of the window's source frames, counted from the first, `frames` frames can start."""
        room = self.length - (frames - 1) / fps - TIME_TOLERANCE
        return max(1, math.ceil(room / self.period - _ROUNDING)) if self.period > 0 else 1


# window, number of frames, frames a second, random numbers -> that many times, rising, inside the window
Pick = Callable[[Window, int, float, np.random.Generator], Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """A registered sampler. `still`: it gives single frames. `whole`: `skip_frms_num` does not apply to it.
    `records`: how many records it makes of a window, given frames and fps; None where that is one."""

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
    """Decorator: call a function a sampler; the arguments are `Sampler`'s.

    The function gets a window, the number of frames (never more than the window gives), frames a second and
    random numbers, and returns as many times in seconds, rising, from the window's start to its end (or to
    start + (frames - 1) / fps, where that is later). The decorator must run before
    the YAML is read; where data workers are spawned instead of forked, use the entry point.

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
    """The sampler of that name, loaded from its package where an entry point has it.

    Raises `ConfigError` for an unknown name, and where the package fails to load.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in points:
        raise unknown_name("sampler", name, (*SAMPLERS, *sorted(points)))
    try:
        pick = points[name].load()
    except Exception as error:  # whatever another package's import raises
        raise ConfigError(
            f"sampler: '{name}' cannot be loaded from '{points[name].value}' ({type(error).__name__}: {error}); "
            "mend or remove that package."
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


def unknown_name(what: str, name: str, valid: Sequence[str]) -> ConfigError:
    """The error for `name`, with the nearest of the `valid` ones."""
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return ConfigError(f"{what}: '{name}' is not known; {hint}valid: {', '.join(valid)}.")


def _windows(window: Window, frames: int, fps: float) -> int:
    # No more than source frames: a file may say that each of them lasts for years.
    return max(1, min(window.inside(fps) // frames, window.frames))


@register_sampler("random_start")
def random_start(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """From anywhere in the clip, at its own speed: each source frame that can be the first is as likely.

    Of 61 frames at 30 fps, 9 at 8 fps reach 30 frames on, so that 0, 1, ... 30 can be the first; here it is 26:

    >>> clip = Window(start=0.0, period=1 / 30, frames=61)
    >>> clip.starts(9, 8)
    31
    >>> [round(30 * t) for t in random_start(clip, 9, 8, np.random.default_rng(0))]
    [26, 30, 34, 37, 41, 45, 48, 52, 56]
    """
    return window.run(int(rng.integers(window.starts(frames, fps))) * window.period, frames, fps)


@register_sampler("start")
def start(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """From the first frame on that trimming leaves, at the clip's own speed.

    >>> clip = Window(start=0.1, period=1 / 30, frames=55)  # 61 frames without three at both ends
    >>> [round(t, 3) for t in start(clip, 5, 8, np.random.default_rng(0))]
    [0.1, 0.225, 0.35, 0.475, 0.6]
    """
    return window.run(0.0, frames, fps)


@register_sampler("middle")
def middle(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """The middle of the clip, at its own speed.

    Of 61 frames at 30 fps, 9 at 8 fps take one second (30 source frames): 15 are left out at both ends.

    >>> [round(t, 3) for t in middle(Window(start=0.0, period=1 / 30, frames=61), 9, 8, np.random.default_rng(0))]
    [0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375, 1.5]
    """
    return window.run((window.starts(frames, fps) - 1) // 2 * window.period, frames, fps)


@register_sampler("uniform")
def uniform(window: Window, frames: int, fps: float, rng: np.random.Generator) -> Sequence[float]:
    """The whole clip from its first frame to its last in even steps: a long one plays faster than life.

    >>> uniform(Window(start=0.0, period=1 / 30, frames=61), 5, 8, np.random.default_rng(0))  # at 2 fps, not 8
    [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    span = (window.frames - 1) * window.period
    if frames == 1 or span <= 0:
        return middle(window, frames, fps, rng)
    return [window.start + span * k / (frames - 1) for k in range(frames)]


@register_sampler("first_frame", still=True, whole=True)
def first_frame(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """The very first frame as a still, also where `skip_frms_num` leaves it out of clips.

    >>> first_frame(Window(start=0.0, period=1 / 30, frames=61), 1, 8, np.random.default_rng(0))
    [0.0]
    """
    return window.run(0.0, frames, fps)


@register_sampler("random_frame", still=True)
def random_frame(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """Any frame of the clip as a still, each as likely; another one at every visit.

    Of 61 frames at 30 fps it is frame 51 here, at 1.7 s:

    >>> random_frame(Window(start=0.0, period=1 / 30, frames=61), 1, 8, np.random.default_rng(0))
    [1.7]
    """
    return window.run(int(rng.integers(window.frames)) * window.period, frames, fps)


@register_sampler("all_windows", records=_windows)
def all_windows(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
    """Every part of a long clip once an epoch: as many windows as fit side by side, each a record of its own.

    They are spread evenly: the first starts where the clip does, the last ends where it does, and what lies
    between them is together shorter than one window. A clip with room for one gives its start. In a bucket
    of one frame (short clips come there under `short_clips: shorter_bucket`), each frame is a window. There are
    never more windows than source frames.

    10 s at 8 fps are 80 frames, so four windows of 17 fit, and start 2.625 s apart, with gaps of 0.5 s:

    >>> film = [Window(start=0.0, period=1 / 8, frames=80, number=i, records=4) for i in range(4)]
    >>> windows = [all_windows(window, 17, 8, np.random.default_rng(0)) for window in film]
    >>> [(times[0], times[-1]) for times in windows]  # the last frame of all is at 79/8 s
    [(0.0, 2.0), (2.625, 4.625), (5.25, 7.25), (7.875, 9.875)]
    """
    if window.records == 1:
        return window.run(0.0, frames, fps)
    # A source slower than `fps` has too few frames to start from: then the windows stand side by side.
    latest = max((window.starts(frames, fps) - 1) * window.period, (window.records - 1) * frames / fps)
    return window.run(latest * window.number / (window.records - 1), frames, fps)
