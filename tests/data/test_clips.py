from __future__ import annotations

import dataclasses
import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat_ext.data import clips
from sat_ext.data.clips import SAMPLERS, STILL_SAMPLERS, ClipTimes, available_frames, sample_times
from sat_ext.errors import ConfigError
from sat_ext.types import SHORT_CLIPS, TIME_TOLERANCE, MediaInfo

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
) -> ClipTimes:
    rng = np.random.default_rng(seed)
    return sample_times(sampler, info=info, frames=frames, fps=fps, rng=rng, short=short, skip_frames=skip_frames)


def shown(times: ClipTimes, fps: float) -> list[int]:
    """The source frames that a decoder shows for the times, at a constant rate."""
    return [int((t + TIME_TOLERANCE) * fps) for t in times.times]


@given(st.sampled_from(CLIP_SAMPLERS), files, st.integers(1, 60), target_rates, skips, seeds)
def test_times_have_the_length_asked_for_and_lie_in_what_is_left_of_the_clip(
    sampler, info, frames, fps, skip, seed
):
    for short in FILLING:
        got = sample(sampler, info, frames, fps, short=short, skip_frames=skip, seed=seed)
        left_out = min(int(skip), (info.frames - 1) // 2)
        assert len(got.times) == frames
        if info.frames == 1:
            assert set(got.times) == {0.0}
        else:
            indices = shown(got, info.fps)
            assert min(indices) >= left_out
            assert max(indices) <= info.frames - 1 - left_out


@given(st.sampled_from(CLIP_SAMPLERS), files, st.integers(1, 60), target_rates, skips, seeds)
def test_num_frames_counts_the_frames_that_are_not_repeats(sampler, info, frames, fps, skip, seed):
    got = sample(sampler, info, frames, fps, skip_frames=skip, seed=seed)
    assert got.num_frames == min(frames, available_frames(info, fps, skip))
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
    assert np.allclose(np.diff(got.times[: got.num_frames]), 1 / fps, atol=1e-8)
    assert got.fps == int(fps + 0.5)


@given(files, target_rates, skips)
def test_available_frames_is_at_least_one_and_one_more_would_not_fit(info, fps, skip):
    n = available_frames(info, fps, skip)
    left = info.frames - 2 * min(int(skip), (info.frames - 1) // 2)
    seconds = 0.0 if info.frames == 1 else left / info.fps
    assert n >= 1
    assert n == 1 or (n - 1) / fps < seconds
    assert n / fps >= seconds - TIME_TOLERANCE - 1e-9


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


def test_49_frames_at_8_fps_need_their_six_seconds_and_one_frame():
    assert available_frames(media(180, 30.0), 8) == 48
    assert available_frames(media(181, 30.0), 8) == 49
    assert available_frames(media(144, 24000 / 1001), 8) == 49  # 6.006 s


def test_a_variable_rate_clip_is_measured_by_its_duration_not_its_rate():
    slow_end = dataclasses.replace(media(30, 30.0), duration=4.0)
    assert available_frames(slow_end, 8) == 32
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
def test_still_samplers_refuse_a_clip_bucket(sampler):
    message = (
        f"sampler: '{sampler}' gives single frames, but 9 were asked for; "
        "add 1 to data.params.buckets.frames, or choose another sampler."
    )
    with pytest.raises(ConfigError) as error:
        sample(sampler, media(30, 8.0), 9)
    assert str(error.value) == message


def test_an_unknown_sampler_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError) as error:
        sample("randomstart", media(30, 8.0), 9)
    assert str(error.value) == (
        "sampler: 'randomstart' is not known; did you mean 'random_start'? "
        "valid: random_start, start, middle, uniform, first_frame, random_frame."
    )


def test_an_unknown_policy_is_named_with_all_there_are():
    with pytest.raises(ConfigError) as error:
        sample("start", media(30, 8.0), 9, short="xyzzy")
    assert str(error.value) == ("short_clips: 'xyzzy' is not known; valid: shorter_bucket, loop, pad_last, drop.")


@pytest.mark.parametrize("short", sorted(set(SHORT_CLIPS) - set(FILLING)))
def test_a_short_clip_under_a_policy_that_does_not_fill_is_our_own_mistake(short):
    with pytest.raises(AssertionError, match="no policy that fills it"):
        sample("start", media(5, 8.0), 9, short=short)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(clips).failed == 0
