"""Which moments of a clip to show: samplers by name. Pure arithmetic in seconds, no media.

Time 0 is the start of the file's first frame; for a time t a decoder shows the last frame that starts at or
before t + `TIME_TOLERANCE`. Times, unlike frame numbers, keep the speed right at every frame rate, constant
or not: a 25 fps clip shown at 8 fps takes frames 0, 3, 6, 9, 12, 15, 18, 21, 25, and lasts as long as it did.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sat_ext.errors import ConfigError
from sat_ext.types import SHORT_CLIPS, TIME_TOLERANCE, MediaInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTimes:
    """What to decode: `times` in seconds, one per frame of the bucket.

    `num_frames` counts those that are not repeats made to fill a short clip; `fps` is what they play at.
    """

    times: tuple[float, ...]
    num_frames: int
    fps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Window:
    """The part of the file that may be shown: `frames` source frames of `period` seconds from `start` on."""

    start: float
    period: float
    frames: int

    @property
    def length(self) -> float:
        return self.frames * self.period


def available_frames(info: MediaInfo, fps: float, skip_frames: float = 0) -> int:
    """How many frames the clip gives at `fps` frames a second, at least 1.

    `skip_frames` source frames are left out at both ends, fewer where the clip is too short for that: at most
    (n - 1) // 2 of n, so that one frame remains. A source slower than `fps` repeats frames in time, as a
    player would, and these count.

    >>> clip = MediaInfo(width=720, height=480, frames=181, fps=30.0, duration=181 / 30, codec="h264")
    >>> available_frames(clip, 8)  # 0/8 s, 1/8 s, ... 48/8 s: the last source frame starts at 180/30 s
    49
    >>> available_frames(clip, 8, skip_frames=3)  # 175 frames are left, 5.83 s
    47
    """
    return _available(_window(info, skip_frames), fps)


def sample_times(
    sampler: str,
    *,
    info: MediaInfo,
    frames: int,
    fps: float,
    rng: np.random.Generator,
    short: str,
    skip_frames: float = 0,
) -> ClipTimes:
    """The times of `frames` frames at `fps` frames a second, by the sampler of that name.

    Only the samplers called random draw from `rng`. A clip of fewer than `frames` frames (see
    `available_frames`) is filled up by "loop" (start over) or "pad_last" (the last one again), as `short`
    says; under the other policies such a clip must not come here. Times rise from frame to frame, but for
    the jump back of "loop" and the standstill of "pad_last". Raises `ConfigError` for an unknown name, and
    when a sampler of stills is asked for more than one frame.

    >>> clip = MediaInfo(width=96, height=96, frames=60, fps=30.0, duration=2.0, codec="h264")
    >>> rng = np.random.default_rng(0)
    >>> sample_times("start", info=clip, frames=5, fps=8, rng=rng, short="loop", skip_frames=3).times
    (0.1, 0.225, 0.35, 0.475, 0.6)

    Of a clip that gives three frames, five are made:

    >>> clip = MediaInfo(width=96, height=96, frames=3, fps=8.0, duration=0.375, codec="h264")
    >>> sample_times("start", info=clip, frames=5, fps=8, rng=rng, short="loop")
    ClipTimes(times=(0.0, 0.125, 0.25, 0.0, 0.125), num_frames=3, fps=8)
    >>> sample_times("start", info=clip, frames=5, fps=8, rng=rng, short="pad_last").times
    (0.0, 0.125, 0.25, 0.25, 0.25)
    """
    assert frames >= 1 and fps > 0
    _require_name("sampler", sampler, tuple(SAMPLERS))
    _require_name("short_clips", short, SHORT_CLIPS)
    if sampler in STILL_SAMPLERS and frames != 1:
        raise ConfigError(
            f"sampler: '{sampler}' gives single frames, but {frames} were asked for; "
            "add 1 to data.params.buckets.frames, or choose another sampler."
        )
    window = _window(info, 0 if sampler == "first_frame" else skip_frames)  # the first is the first
    real = min(frames, _available(window, fps))
    assert real == frames or short in _FILL, "a clip too short for its bucket, and no policy that fills it"
    times, rate = SAMPLERS[sampler](window, real, fps, rng)
    if real < frames:
        times = [times[_FILL[short](i, real)] for i in range(frames)]
    return ClipTimes(times=tuple(round(t, 9) for t in times), num_frames=real, fps=max(1, math.floor(rate + 0.5)))


def _require_name(what: str, name: str, valid: tuple[str, ...]) -> None:
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise ConfigError(f"{what}: '{name}' is not known; {hint}valid: {', '.join(valid)}.")


def _window(info: MediaInfo, skip_frames: float) -> _Window:
    assert info.frames >= 1 and skip_frames >= 0
    if info.frames == 1 or info.duration <= 0:
        return _Window(start=0.0, period=0.0, frames=1)
    skip = min(int(skip_frames), (info.frames - 1) // 2)
    period = info.duration / info.frames  # the mean one, where the rate varies
    return _Window(start=skip * period, period=period, frames=info.frames - 2 * skip)


def _available(window: _Window, fps: float) -> int:
    """Frames at times start + k / fps that begin before the window ends."""
    return max(1, math.ceil((window.length - TIME_TOLERANCE) * fps))


def _starts(window: _Window, frames: int, fps: float) -> int:
    """From how many of the window's source frames, counted from the first, `frames` frames can start."""
    room = window.length - (frames - 1) / fps - TIME_TOLERANCE
    return max(1, math.ceil(room / window.period)) if window.period > 0 else 1


def _run_from(window: _Window, first: int, frames: int, fps: float) -> tuple[list[float], float]:
    """`frames` times at `fps`, the first of them the start of the window's source frame `first`."""
    start = window.start + first * window.period
    return [start + k / fps for k in range(frames)], fps


def _start(window: _Window, frames: int, fps: float, rng: np.random.Generator) -> tuple[list[float], float]:
    return _run_from(window, 0, frames, fps)


def _random_start(window: _Window, frames: int, fps: float, rng: np.random.Generator) -> tuple[list[float], float]:
    return _run_from(window, int(rng.integers(_starts(window, frames, fps))), frames, fps)


def _middle(window: _Window, frames: int, fps: float, rng: np.random.Generator) -> tuple[list[float], float]:
    return _run_from(window, (_starts(window, frames, fps) - 1) // 2, frames, fps)


def _uniform(window: _Window, frames: int, fps: float, rng: np.random.Generator) -> tuple[list[float], float]:
    """From the window's first source frame to its last in even steps: a long clip plays faster than life."""
    span = (window.frames - 1) * window.period
    if frames == 1 or span <= 0:
        return _middle(window, frames, fps, rng)
    return [window.start + span * k / (frames - 1) for k in range(frames)], (frames - 1) / span


def _random_frame(window: _Window, frames: int, fps: float, rng: np.random.Generator) -> tuple[list[float], float]:
    return _run_from(window, int(rng.integers(window.frames)), frames, fps)


_Sampler = Callable[[_Window, int, float, np.random.Generator], tuple[list[float], float]]

SAMPLERS: dict[str, _Sampler] = {
    "random_start": _random_start,  # anywhere in the clip, at its own speed
    "start": _start,
    "middle": _middle,
    "uniform": _uniform,  # the whole clip, at whatever speed that takes
    "first_frame": _start,
    "random_frame": _random_frame,
}

STILL_SAMPLERS = frozenset({"first_frame", "random_frame"})

# Which of the `real` frames stands at place i of a short clip.
_FILL: dict[str, Callable[[int, int], int]] = {
    "loop": lambda i, real: i % real,
    "pad_last": lambda i, real: min(i, real - 1),
}
