"""From a clip's length and rate to the times to decode, repeating frames of short clips. Pure."""

import math
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from sat_ext.data.clips.samplers import Sampler, Window, find_sampler
from sat_ext.errors import ConfigError
from sat_ext.types import MediaInfo

MOST_RECORDS = 1 << 24  # of one clip, as each takes memory


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipTimes:
    """What to decode: `times` in seconds, one per frame of the bucket.

    `num_frames` counts them without the repeats that fill a short clip; `fps` is what they play at.
    """

    times: tuple[float, ...]
    num_frames: int
    fps: int


def available_frames(info: MediaInfo, fps: float) -> int:
    """The length in frames, at `fps` frames a second, of the longest bucket that the whole clip fills, at least 1.

    See `Window.available`. A source slower than `fps` repeats frames as a player would, and these count.

    >>> clip = MediaInfo(width=720, height=480, frames=180, fps=30.0, duration=6.0, codec="h264")
    >>> available_frames(clip, 8)  # 0/8 s, 1/8 s, ... 47/8 s, and the last source frame, at 179/30 s, for 48/8 s
    49
    """
    return _whole(info).available(fps)


def records_of(sampler: str, info: MediaInfo, *, frames: int, fps: float, skip_frames: float = 0) -> int:
    """How many records one file makes in a bucket of `frames` frames: 1, except with `all_windows`.

    Raises `ConfigError` for an unknown name, and for an invalid number from a custom sampler.

    >>> clip = MediaInfo(width=96, height=96, frames=300, fps=30.0, duration=10.0, codec="h264")
    >>> [records_of("all_windows", clip, frames=n, fps=8) for n in (17, 33, 49, 97)]  # 80 frames at 8 fps
    [4, 2, 1, 1]
    >>> records_of("random_start", clip, frames=17, fps=8)
    1
    """
    found = find_sampler(sampler)
    return _records(sampler, found, _window(info, 0 if found.whole else skip_frames, frames, fps), frames, fps)


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

    `skip_frames` source frames are trimmed from both ends: at most (n - 1) // 2 of n, and no more than let the
    clip still fill its bucket with at least two source frames. `window` is which of the `records_of` records
    `all_windows` gives, and must be 0 for the others. A clip of fewer than `frames` frames (see
    `available_frames`) is filled by "loop" (start over) or "pad_last" (repeat the last), as `short` says; under
    the other policies it must not come here. Times rise, except for the jump back of "loop" and the repeats of
    "pad_last". Raises `ConfigError` for an unknown name, a sampler of stills asked for more than one frame, and a
    custom sampler's invalid times.

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
    found = find_sampler(sampler)
    if found.still and frames != 1:
        raise ConfigError(
            f"sampler: '{sampler}' gives single frames, but the bucket has {frames}; "
            "add 1 to data.params.buckets.frames, or choose another sampler."
        )
    part = _window(info, 0 if found.whole else skip_frames, frames, fps)
    records = _records(sampler, found, part, frames, fps)
    assert 0 <= window < records, f"window {window} of {records}"
    part = replace(part, number=window, records=records)
    real = frames if part.available(fps) >= frames else part.inside(fps)
    assert real == frames or short in _FILL, "a clip too short for its bucket, and no policy that fills it"
    with _blaming(sampler):
        times = [round(float(t), 9) for t in found.pick(part, real, fps, rng)]
    _check_times(sampler, times, part, part.start + max(part.length, (real - 1) / fps), real)
    rate = round((real - 1) / (times[-1] - times[0]), 6) if real > 1 else fps
    times = [round(part.clamp(t), 9) for t in times]
    if real < frames:
        times = [times[_FILL[short](i, real)] for i in range(frames)]
    return ClipTimes(times=tuple(times), num_frames=real, fps=max(1, math.floor(rate + 0.5)))


def _check_times(sampler: str, times: Sequence[float], window: Window, end: float, frames: int) -> None:
    rising = all(a < b for a, b in zip(times, times[1:]))
    if len(times) != frames or not rising or not window.start - 1e-6 <= times[0] <= times[-1] <= end + 1e-6:
        raise ConfigError(
            f"sampler: '{sampler}' gave the times {[round(t, 3) for t in times]} for {frames} frames; fix it, so "
            f"that as many rise from {window.start:.3f} s to at most {end:.3f} s."
        )


def _records(sampler: str, found: Sampler, window: Window, frames: int, fps: float) -> int:
    if found.records is None:
        return 1
    with _blaming(sampler):
        count = found.records(window, frames, fps)
    if not isinstance(count, (int, np.integer)) or not 1 <= count <= MOST_RECORDS:
        raise ConfigError(
            f"sampler: '{sampler}' says that a clip makes {count!r} records; fix it, so that it is a whole number "
            f"from 1 to {MOST_RECORDS}."
        )
    return int(count)


@contextmanager
def _blaming(sampler: str) -> Iterator[None]:
    """Turns what another package's sampler raises into a `ConfigError` with its line, as no traceback is shown."""
    try:
        yield
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"sampler: '{sampler}' failed with {what} ({line.filename}, line {line.lineno}); fix it."
        ) from error


def _whole(info: MediaInfo) -> Window:
    assert info.frames >= 1
    if info.frames == 1 or info.duration <= 0:
        return Window(start=0.0, period=0.0, frames=1)
    # the mean period if the rate varies
    return Window(start=0.0, period=info.duration / info.frames, frames=info.frames)


def _window(info: MediaInfo, skip_frames: float, frames: int, fps: float) -> Window:
    assert skip_frames >= 0
    whole = _whole(info)
    most = min(int(skip_frames), (whole.frames - 1) // 2)
    if not most:
        return whole

    def without(skip: int) -> Window:
        return replace(whole, start=skip * whole.period, frames=whole.frames - 2 * skip)

    def is_too_much(skip: int) -> bool:
        part = without(skip)
        # one source frame can last as long as the bucket, but would be a still
        return part.available(fps) < frames or part.frames < min(frames, 2)

    # a clip that is too short for its bucket anyway is filled with repeats, so it can be trimmed fully
    return without(most if is_too_much(0) else bisect_left(range(1, most + 1), True, key=is_too_much))


# Which of the `real` frames stands at place i of a short clip.
_FILL: dict[str, Callable[[int, int], int]] = {
    "loop": lambda i, real: i % real,
    "pad_last": lambda i, real: min(i, real - 1),
}
