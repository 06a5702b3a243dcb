from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat_ext.data import clips
from sat_ext.data.clips import (
    SAMPLERS,
    ClipTimes,
    Window,
    available_frames,
    find_sampler,
    records_of,
    register_sampler,
    sample_times,
)
from sat_ext.errors import ConfigError
from sat_ext.types import SHORT_CLIPS, TIME_TOLERANCE, MediaInfo

STILL_SAMPLERS = {name for name, sampler in SAMPLERS.items() if sampler.still}
CLIP_SAMPLERS = sorted(set(SAMPLERS) - STILL_SAMPLERS)
FILLING = ("loop", "pad_last")

file_rates = st.sampled_from([1.0, 5.0, 8.0, 12.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 60.0, 240.0])
target_rates = st.sampled_from([1.0, 7.5, 8.0, 16.0, 24.0])
skips = st.sampled_from([0.0, 1.0, 3.0, 100.0])
seeds = st.integers(0, 2**32 - 1)


def media(frames: int, fps: float) -> MediaInfo:
    still = frames == 1
    return MediaInfo(
        width=64,
        height=64,
        frames=frames,
        fps=0.0 if still else fps,
        duration=0.0 if still else frames / fps,
        codec="h264",
    )


files = st.builds(media, st.integers(1, 400), file_rates)


def sample(
    sampler: str,
    info: MediaInfo,
    frames: int,
    fps: float = 8.0,
    *,
    short: str = "pad_last",
    skip_frames: float = 0,
    seed: int = 0,
    window: int = 0,
) -> ClipTimes:
    return sample_times(
        sampler,
        info=info,
        frames=frames,
        fps=fps,
        rng=np.random.default_rng(seed),
        short=short,
        skip_frames=skip_frames,
        window=window,
    )


def shown(times: ClipTimes, fps: float) -> list[int]:
    """The source frames that a decoder shows for the times, at a constant rate."""
    return [int((t + TIME_TOLERANCE) * fps) for t in times.times]


def trimmed(info: MediaInfo, skip: float, frames: int, fps: float) -> int:
    """How many source frames are left out at each end: a clip that fills its bucket still fills it."""

    def left(skip: int) -> MediaInfo:
        n = info.frames - 2 * skip
        return dataclasses.replace(info, frames=n, duration=info.duration * n / info.frames)

    most = min(int(skip), (info.frames - 1) // 2)
    if available_frames(info, fps) < frames:
        return most
    return max(s for s in range(most + 1) if available_frames(left(s), fps) >= frames)


@given(st.sampled_from(CLIP_SAMPLERS), files, st.integers(1, 60), target_rates, skips, seeds)
def test_times_have_the_length_asked_for_and_lie_in_what_is_left_of_the_clip(
    sampler, info, frames, fps, skip, seed
):
    for short in FILLING:
        got = sample(sampler, info, frames, fps, short=short, skip_frames=skip, seed=seed)
        left_out = trimmed(info, skip, frames, fps)
        assert len(got.times) == frames
        if info.frames == 1:
            assert set(got.times) == {0.0}
        else:
            indices = shown(got, info.fps)
            assert min(indices) >= left_out
            assert max(indices) <= info.frames - 1 - left_out
            assert max(got.times) < (info.frames - left_out) / info.fps


@given(st.sampled_from(CLIP_SAMPLERS), files, st.integers(1, 60), target_rates, skips, seeds)
def test_num_frames_counts_the_frames_that_are_not_repeats(sampler, info, frames, fps, skip, seed):
    got = sample(sampler, info, frames, fps, skip_frames=skip, seed=seed)
    if available_frames(info, fps) >= frames:
        assert got.num_frames == frames
    else:
        n = info.frames - 2 * trimmed(info, skip, frames, fps)
        seconds = n / info.fps if info.frames > 1 else 0.0
        assert got.num_frames < frames and abs(got.num_frames - seconds * fps) <= 1
    real = got.times[: got.num_frames]
    rises = len(set(real)) == len(real) and list(real) == sorted(real)
    assert rises
    assert got.times[got.num_frames :] == (real[-1],) * (frames - got.num_frames)


@given(st.sampled_from(CLIP_SAMPLERS), files, st.integers(1, 60), seeds)
def test_loop_starts_over_from_the_first_time(sampler, info, frames, seed):
    got = sample(sampler, info, frames, short="loop", seed=seed)
    real = got.times[: got.num_frames]
    assert got.times == tuple(real[i % len(real)] for i in range(frames))


@given(st.sampled_from(sorted(SAMPLERS)), files, seeds)
def test_the_same_seed_gives_the_same_times(sampler, info, seed):
    frames = 1 if sampler in STILL_SAMPLERS else 9
    assert sample(sampler, info, frames, seed=seed) == sample(sampler, info, frames, seed=seed)


@given(st.sampled_from(["start", "middle", "random_start"]), files, st.integers(2, 49), target_rates, seeds)
def test_a_clip_plays_at_its_own_speed(sampler, info, frames, fps, seed):
    got = sample(sampler, info, frames, fps, seed=seed)
    steps = np.diff(got.times[: got.num_frames])
    assert np.allclose(steps[:-1], 1 / fps, atol=1e-8)  # the last frame may be nearer: the clip ends there
    assert not len(steps) or 0 < steps[-1] <= 1 / fps + 1e-8
    assert got.fps == int(fps + 0.5)


@given(files, target_rates)
def test_available_frames_is_at_least_one_and_one_more_would_not_fit(info, fps):
    n = available_frames(info, fps)
    seconds, last = (0.0, 0.0) if info.frames == 1 else (info.duration, (info.frames - 1) / info.fps)
    assert n >= 1
    assert n == 1 or (n - 1) / fps <= max(seconds + TIME_TOLERANCE, last + 1 / fps)
    assert n / fps >= max(seconds, last + 1 / fps) - 2 * TIME_TOLERANCE


@given(st.sampled_from([1, 2, 3, 6, 10]), file_rates, target_rates, skips)
@settings(deadline=None)
def test_whole_seconds_fill_their_bucket_at_every_rate_and_whatever_is_skipped(seconds, rate, fps, skip):
    info = media(round(seconds * rate), rate)
    frames = int(seconds * fps) + 1
    if info.frames < 2 or info.duration < seconds - TIME_TOLERANCE:
        return
    assert available_frames(info, fps) >= frames
    for sampler in CLIP_SAMPLERS:
        got = sample(sampler, info, frames, fps, skip_frames=skip)
        assert got.num_frames == frames and max(shown(got, rate)) <= info.frames - 1
        if sampler != "uniform":
            assert got.fps == int(fps + 0.5)


@given(files, target_rates, skips, seeds)
@settings(deadline=None)
def test_a_clip_fills_the_longest_bucket_that_it_can_without_a_frame_twice(info, fps, skip, seed):
    n = available_frames(info, fps)
    got = sample("random_start", info, n, fps, skip_frames=skip, seed=seed)
    assert got.num_frames == n
    if info.fps > fps:
        indices = shown(got, info.fps)
        assert len(set(indices)) == n


@pytest.mark.parametrize("rate", [24.0, 25.0, 30.0, 50.0, 60.0])
def test_trimming_leaves_what_the_longest_bucket_needs(rate):
    six = media(round(6 * rate), rate)  # CogVideo's usual clip, with its `skip_frms_num: 3`
    assert available_frames(six, 8) == 49
    got = sample("start", six, 49, skip_frames=3)
    assert got.num_frames == 49 and got.fps == 8
    assert 0 <= got.times[0] <= 3 / rate and shown(got, rate)[-1] <= six.frames - 1
    assert sample("start", media(round(7 * rate), rate), 49, skip_frames=3).times[0] == pytest.approx(3 / rate)
    assert sample("start", six, 41, skip_frames=3).times[0] == pytest.approx(3 / rate)


def test_random_start_reaches_every_start_from_which_the_clip_fits():
    info = media(70, 24.0)  # 9 frames at 8 fps reach 24 source frames further: starts 3 ... 67 - 25 = 42
    starts = {shown(sample("random_start", info, 9, seed=s, skip_frames=3), 24.0)[0] for s in range(800)}
    assert starts == set(range(3, 43))


def test_random_frame_reaches_every_frame_that_is_not_skipped():
    info = media(20, 25.0)
    seen = {shown(sample("random_frame", info, 1, seed=s, skip_frames=3), 25.0)[0] for s in range(400)}
    assert seen == set(range(3, 17))


def test_each_sampler_takes_the_part_it_is_named_for():
    info = media(61, 30.0)
    assert sample("start", info, 9, skip_frames=3).times[0] == pytest.approx(0.1)
    assert sample("first_frame", info, 1, skip_frames=3).times == (0.0,)
    assert sample("middle", info, 1).times == (1.0,)
    whole = sample("uniform", info, 5)
    assert whole.times == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert whole.fps == 2  # four steps in two seconds


@pytest.mark.parametrize(
    "fps, expected",
    [
        (25.0, [0, 3, 6, 9, 12, 15, 18, 21, 25]),  # no whole stride gives 8 fps
        (30.0, [0, 3, 7, 11, 15, 18, 22, 26, 30]),
        (8.0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (4.0, [0, 0, 1, 1, 2, 2, 3, 3, 4]),  # slower than the target: repeated in time, as a player shows it
    ],
)
def test_every_source_rate_becomes_the_target_rate(fps, expected):
    assert shown(sample("start", media(60, fps), 9), fps) == expected


def test_a_clip_that_lacks_less_than_a_frame_of_the_target_rate_fills_its_bucket():
    assert available_frames(media(180, 30.0), 8) == 49  # its last frame starts at 5.967 s, and 6.0 are wanted
    assert available_frames(media(178, 30.0), 8) == 49  # 5.9 s
    assert available_frames(media(177, 30.0), 8) == 48  # 5.867 s: the 48th of 49 shows it already
    assert available_frames(media(60, 30.0), 8) == 17
    assert available_frames(media(150, 30.0), 16) == 81
    assert available_frames(media(48, 8.0), 8) == 49 and available_frames(media(47, 8.0), 8) == 48
    assert sample("start", media(180, 30.0), 49).times[-2:] == pytest.approx((5.875, 5.998))


def test_a_clip_that_is_filled_up_counts_only_what_it_has():
    got = sample("start", media(5, 8.0), 9, short="loop")
    assert got.num_frames == 5 and got.times[5] == 0.0


def test_a_variable_rate_clip_is_measured_by_its_duration_not_its_rate():
    slow_end = dataclasses.replace(media(30, 30.0), duration=4.0)
    assert available_frames(slow_end, 8) == 33
    assert max(sample("uniform", slow_end, 32).times) < 4.0


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("frames", [1, 2, 3, 6, 7])
def test_tiny_clips_give_at_least_one_frame_whatever_is_skipped(sampler, frames):
    got = sample(sampler, media(frames, 30.0), 1, skip_frames=3)
    assert got.num_frames == 1
    assert 0.0 <= got.times[0] < frames / 30.0


def test_a_still_shows_its_only_frame():
    assert sample("random_start", media(1, 0.0), 1) == ClipTimes(times=(0.0,), num_frames=1, fps=8)


@pytest.mark.parametrize("sampler", sorted(STILL_SAMPLERS))
def test_a_still_of_several_frames_is_our_own_mistake(sampler):
    with pytest.raises(AssertionError):
        sample(sampler, media(30, 8.0), 9)


def test_an_unknown_sampler_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError) as error:
        sample("randomstart", media(30, 8.0), 9)
    assert str(error.value) == (
        "sampler: 'randomstart' is not one of random_start, start, first_frame, middle, uniform, random_frame, "
        "all_windows (did you mean 'random_start'?)."
    )


@pytest.mark.parametrize("short", sorted(set(SHORT_CLIPS) - set(FILLING)))
def test_a_short_clip_under_a_policy_that_does_not_fill_is_our_own_mistake(short):
    with pytest.raises(AssertionError, match="no policy that fills it"):
        sample("start", media(5, 8.0), 9, short=short)


def test_the_samplers_of_stills_are_the_two_that_are_named_for_a_frame():
    assert {"first_frame", "random_frame"} == STILL_SAMPLERS


@given(st.sampled_from(sorted(set(SAMPLERS) - {"all_windows"})), files, st.integers(1, 60), target_rates, skips)
def test_samplers_but_all_windows_make_one_record_of_a_file(sampler, info, frames, fps, skip):
    assert records_of(sampler, info, frames=frames, fps=fps, skip_frames=skip) == 1


@given(files, st.integers(1, 60), target_rates, skips)
@settings(deadline=None)
def test_all_windows_covers_a_clip_side_by_side_with_less_than_a_window_left_over(info, frames, fps, skip):
    n = records_of("all_windows", info, frames=frames, fps=fps, skip_frames=skip)
    left_out = trimmed(info, skip, frames, fps)
    seconds = 0.0 if info.frames == 1 else (info.frames - 2 * left_out) / info.fps
    inside = int(np.ceil((seconds - TIME_TOLERANCE) * fps - 1e-6))
    assert n == max(1, min(inside // frames, info.frames - 2 * left_out))
    if available_frames(info, fps) < frames or n > 500:
        return
    windows = [sample("all_windows", info, frames, fps, skip_frames=skip, window=i) for i in range(n)]
    period = info.duration / info.frames
    start, end = left_out * period, (info.frames - left_out) * period
    length = frames / fps  # of one window, to the end of its last frame
    assert all(w.num_frames == frames and w.fps == int(fps + 0.5) for w in windows)
    assert windows[0].times[0] == pytest.approx(start)
    for a, b in zip(windows, windows[1:]):
        # no moment is in two windows, but for what keeps the last time from the very end of the clip
        assert b.times[0] >= a.times[0] + length - 2 * TIME_TOLERANCE - 1e-6
    gaps = [b.times[0] - a.times[0] - length for a, b in zip(windows, windows[1:])]
    last = windows[-1].times[-1]
    if n == inside // frames:  # and not as many as there are source frames
        assert sum(gaps) < length + TIME_TOLERANCE + 1e-6
    assert max(gaps, default=0.0) - min(gaps, default=0.0) < 2 * TIME_TOLERANCE + 1e-6  # evenly spread
    if info.frames > 1:
        assert last + TIME_TOLERANCE <= end + 1e-6  # not one of the frames that are skipped
    if n > 1:
        assert end - last <= max(period, 1 / fps) + 2 * TIME_TOLERANCE  # the last one ends where the clip does


@given(files, st.integers(1, 30), seeds)
def test_all_windows_draws_nothing(info, frames, seed):
    n = records_of("all_windows", info, frames=frames, fps=8)
    for i in (0, n - 1):
        assert sample("all_windows", info, frames, window=i) == sample(
            "all_windows", info, frames, window=i, seed=seed
        )


def test_trimming_leaves_no_clip_a_standstill():
    """One frame of a slow source lasts as long as the bucket."""
    clip = media(3, 1.0)
    assert records_of("all_windows", clip, frames=2, fps=7.5, skip_frames=1) == 3
    assert sample("start", clip, 2, 1.0, skip_frames=1).times == (0.0, 1.0)


def test_two_frames_that_claim_to_last_for_years_make_two_windows():
    info = MediaInfo(width=64, height=64, frames=2, fps=2e-12, duration=1e12, codec="h264")
    assert records_of("all_windows", info, frames=9, fps=8) == 2


def test_all_windows_fills_a_short_clip_as_other_samplers_do():
    assert sample("all_windows", media(5, 8.0), 9, short="loop") == sample("start", media(5, 8.0), 9, short="loop")


def test_a_window_that_is_not_there_is_our_own_mistake():
    with pytest.raises(AssertionError, match="window 1 of 1"):
        sample("random_start", media(100, 8.0), 9, window=1)
    with pytest.raises(AssertionError, match="window 11 of 11"):
        sample("all_windows", media(100, 8.0), 9, window=11)


@pytest.fixture
def name() -> Iterator[str]:
    yield "ours"
    SAMPLERS.pop("ours", None)


def test_a_sampler_of_ones_own_is_used_by_its_name(name):
    @register_sampler(name, still=True, whole=True)
    def last(window, frames, fps, rng):
        return [window.start + (window.frames - 1) * window.period]

    assert sample(name, media(80, 8.0), 1, skip_frames=3).times == (9.875,)
    assert find_sampler(name).still
    assert "did you mean 'ours'?" in str(refusal("our"))


def refusal(sampler: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        sample(sampler, media(80, 8.0), 2)
    return error.value


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.0], [1.0, 0.5], [-1.0, 0.0], [9.0, 11.0], [0.0, float("nan")]])
def test_times_that_a_sampler_must_not_give_are_refused(name, times):
    register_sampler(name)(lambda window, frames, fps, rng: times)
    assert str(refusal(name)) == (
        f"sampler: 'ours' gave the times {times} for 2 frames; fix it, so that as many rise from 0.000 s to at "
        "most 10.000 s."
    )


def test_a_time_that_is_no_number_is_refused_for_a_single_frame_too(name):
    register_sampler(name)(lambda window, frames, fps, rng: [float("nan")])
    with pytest.raises(ConfigError, match=r"gave the times \[nan\] for 1 frames"):
        sample(name, media(80, 8.0), 1)


@pytest.mark.parametrize("count", [0, -1, 2.5, None, "3", 10**9, float("nan")])
def test_a_number_of_records_that_cannot_be_is_refused(name, count):
    register_sampler(name, records=lambda window, frames, fps: count)(lambda window, frames, fps, rng: [0.0])
    with pytest.raises(ConfigError, match=f"'ours' makes {count!r} records of a clip; make it 1 to"):
        records_of(name, media(80, 8.0), frames=9, fps=8)


def offer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    points = EntryPoints([EntryPoint("ours", value, "sat_ext.samplers")])
    monkeypatch.setattr(clips, "entry_points", lambda *, group: points.select(group=group))


@pytest.mark.parametrize("decorated", [False, True])
def test_a_sampler_of_another_package_is_found_by_its_entry_point(name, monkeypatch, decorated):
    module = ModuleType("their_samplers")

    def ours(window: Window, frames: int, fps: float, rng: np.random.Generator) -> list[float]:
        return window.run(0.5, frames, fps)

    module.__getattr__ = lambda _: register_sampler(name, still=True)(ours) if decorated else ours  # type: ignore
    monkeypatch.setitem(sys.modules, "their_samplers", module)
    offer(monkeypatch, "their_samplers:ours")
    assert sample(name, media(80, 8.0), 1).times == (0.5,)
    assert find_sampler(name).still == decorated


def test_a_package_that_cannot_be_loaded_is_named(name, monkeypatch):
    offer(monkeypatch, "no_such_package:ours")
    assert str(refusal(name)) == (
        "sampler: 'ours' cannot be loaded from 'no_such_package:ours' (ModuleNotFoundError: No module named "
        "'no_such_package'); fix or remove that package."
    )
    assert str(refusal("ourz")).endswith("all_windows, ours (did you mean 'ours'?).")
