from __future__ import annotations

import doctest
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat_ext.data import buckets
from sat_ext.data.buckets import (
    AreaConfig,
    BucketConfig,
    SequenceShape,
    assign,
    batch_sizes,
    make_buckets,
    step_cost,
    tokens,
)
from sat_ext.errors import ConfigError
from sat_ext.types import SHORT_CLIPS, Bucket, MediaInfo

VIDEO_SIZE = (480, 720)

lengths = st.integers(0, 20).map(lambda k: 4 * k + 1)
sides = st.integers(1, 60).map(lambda k: 16 * k)
bucket_sets = st.lists(st.builds(Bucket, frames=lengths, height=sides, width=sides), min_size=1, max_size=12)


def media(width: int = 1280, height: int = 720, frames: int = 100) -> MediaInfo:
    return MediaInfo(width=width, height=height, frames=frames, fps=25.0, duration=frames / 25, codec="h264")


def names(made: tuple[Bucket, ...]) -> list[str]:
    return [str(b) for b in made]


def frames_of(result: Bucket | str) -> int:
    assert isinstance(result, Bucket)
    return result.frames


@pytest.mark.parametrize(
    "most, expected",
    [
        (1, [1]),
        (9, [1, 9]),
        (13, [1, 9, 13]),
        (49, [1, 9, 17, 25, 33, 41, 49]),
        (81, [1, 9, 17, 25, 33, 41, 49, 57, 65, 73, 81]),
    ],
)
def test_default_lengths_rise_by_8_up_to_the_longest(most, expected):
    made = make_buckets(BucketConfig(), VIDEO_SIZE, most)
    assert [b.frames for b in made] == expected
    assert {(b.height, b.width) for b in made} == {VIDEO_SIZE}


def test_explicit_lengths_and_sizes_need_no_stand_ins():
    assert names(make_buckets(BucketConfig(frames=(5,), sizes=((64, 64),)), None, None)) == ["5x64x64"]
    assert names(
        make_buckets(BucketConfig(frames=(5,), sizes=AreaConfig(area=4096, ratios=(1.0,))), None, None)
    ) == ["5x64x64"]


def test_every_length_is_made_in_every_size_once():
    config = BucketConfig(frames=(17, 1, 17), sizes=((480, 720), (576, 576), (480, 720)))
    assert names(make_buckets(config, VIDEO_SIZE, 49)) == [
        "1x480x720",
        "1x576x576",
        "17x480x720",
        "17x576x576",
    ]


@given(st.integers(256 * 4, 10**8), st.lists(st.floats(0.25, 4.0), min_size=1, max_size=6))
def test_sizes_by_area_stay_within_it_and_near_their_ratio(area, ratios):
    for ratio in ratios:
        config = BucketConfig(frames=(1,), sizes=AreaConfig(area=area, ratios=(ratio,)))
        (bucket,) = make_buckets(config, VIDEO_SIZE, 49)
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert bucket.height * bucket.width <= area
        short_side = math.sqrt(area * min(ratio, 1 / ratio))
        assert abs(math.log(bucket.width / bucket.height / ratio)) <= 32 / max(16, short_side - 16)


def test_ratios_alone_use_the_area_of_video_size_and_area_alone_the_usual_ratios():
    assert names(make_buckets(BucketConfig(frames=(1,), sizes=AreaConfig(ratios=(1.0, 1.5))), VIDEO_SIZE, 49)) == [
        "1x480x720",
        "1x576x576",
    ]
    assert names(make_buckets(BucketConfig(frames=(1,), sizes=AreaConfig(area=480 * 720)), VIDEO_SIZE, 49)) == [
        "1x432x768",
        "1x512x672",
        "1x576x576",
        "1x672x512",
        "1x768x432",
    ]


def complaint(config: dict, video_size=VIDEO_SIZE, most=49) -> str:
    with pytest.raises(ConfigError) as error:
        make_buckets(BucketConfig(**config), video_size, most)
    return str(error.value).removeprefix("data.params.")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"frames": (1, 16)}, "frames: 16 frames cannot be encoded (1, 5, 9, ... can); use 13 or 17."),
        ({"frames": (0,)}, "frames: 0 frames cannot be encoded (1, 5, 9, ... can); use 1."),
        ({"frames": (-3,)}, "frames: -3 frames cannot be encoded (1, 5, 9, ... can); use 1."),
        ({"frames": ()}, "frames: the list is empty; name a length, or leave the key out."),
        (
            {"sizes": ((480, 720), (9, 500))},
            "sizes: [9, 500] (height, width) is not in multiples of 16; use [16, 496].",
        ),
        ({"sizes": ((0, 64),)}, "sizes: [0, 64] (height, width) is not in multiples of 16; use [16, 64]."),
        ({"sizes": ()}, "sizes: the list is empty; name a size [height, width], or leave the key out."),
        (
            {"sizes": AreaConfig(area=300, ratios=(2.0,))},
            "sizes.area: 300 pixels are too few for the ratio 2; use 512 or more.",
        ),
        (
            {"sizes": AreaConfig(ratios=(1.0, 0.0))},
            "sizes.ratios: 0.0 is not a width / height; use a number above 0, such as 1.5.",
        ),
        (
            {"sizes": AreaConfig(ratios=())},
            "sizes.ratios: the list is empty; name a ratio, or leave the key out.",
        ),
    ],
)
def test_buckets_that_cannot_be_are_named_with_the_nearest_that_can(config, message):
    assert complaint(config) == f"buckets.{message}"


def test_stand_ins_that_cannot_be_or_are_missing_are_named():
    assert complaint({}, most=48) == (
        "max_num_frames: 48 frames cannot be encoded (1, 5, 9, ... can); use 45 or 49."
    )
    assert complaint({}, most=None) == (
        "max_num_frames: missing, and there is no data.params.buckets.frames; add one of them."
    )
    assert complaint({}, video_size=(480, 721)) == (
        "video_size: [480, 721] (height, width) is not in multiples of 16; use [480, 720]."
    )
    for config in ({}, {"sizes": AreaConfig(ratios=(1.0,))}):
        assert complaint(config, video_size=None) == (
            "video_size: missing, and there is no data.params.buckets.sizes; add one of them."
        )


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -1.0])
def test_ratios_that_are_no_ratio_are_refused(ratio):
    with pytest.raises(ConfigError, match="is not a width / height; use a number above 0"):
        make_buckets(BucketConfig(sizes=AreaConfig(ratios=(ratio,))), VIDEO_SIZE, 49)


@pytest.mark.parametrize(
    "available, short, expected",
    [
        (100, "shorter_bucket", 49),
        (49, "shorter_bucket", 49),
        (48, "shorter_bucket", 17),
        (5, "shorter_bucket", 1),
        (5, "loop", 49),
        (5, "pad_last", 49),
        (49, "drop", 49),
        (100, "drop", 49),
    ],
)
def test_the_length_of_a_clip_follows_the_policy(available, short, expected):
    made = make_buckets(BucketConfig(frames=(1, 17, 49)), VIDEO_SIZE, 49)
    assert frames_of(assign(media(), made, available=available, still=False, short=short)) == expected


@pytest.mark.parametrize("short", SHORT_CLIPS)
def test_stills_and_files_of_one_frame_get_one_frame_under_every_policy(short):
    made = make_buckets(BucketConfig(), VIDEO_SIZE, 49)
    assert frames_of(assign(media(), made, available=100, still=True, short=short)) == 1
    assert frames_of(assign(media(frames=1), made, available=1, still=False, short=short)) == 1


def test_the_reasons_for_dropping_a_file_say_what_is_missing():
    clips_only = make_buckets(BucketConfig(frames=(17, 49)), VIDEO_SIZE, 49)
    assert assign(media(frames=1), clips_only, available=1, still=True, short="loop") == (
        "a still, but no bucket has 1 frame"
    )
    assert assign(media(), clips_only, available=6, still=False, short="shorter_bucket") == (
        "too short for the shortest bucket (6 of 17 frames)"
    )
    assert assign(media(), clips_only, available=48, still=False, short="drop") == (
        "too short for the longest bucket (48 of 49 frames), and short_clips is drop"
    )


@pytest.mark.parametrize(
    "width, height, expected",
    [
        (1280, 720, "192x320"),
        (1280, 820, "480x720"),
        (720, 1280, "720x480"),
        (1000, 900, "576x576"),
        (300, 200, "480x720"),
        (3000, 2000, "480x720"),
    ],
)
def test_the_size_nearest_in_shape_is_chosen(width, height, expected):
    sizes = ((480, 720), (720, 480), (576, 576), (192, 320))
    made = make_buckets(BucketConfig(frames=(1,), sizes=sizes), VIDEO_SIZE, 49)
    assert str(assign(media(width, height), made, available=1, still=True, short="drop")) == f"1x{expected}"


def test_sizes_of_one_shape_are_distinguished_by_area():
    made = make_buckets(BucketConfig(frames=(1,), sizes=((64, 96), (192, 288), (480, 720))), VIDEO_SIZE, 49)
    small = assign(media(300, 200), made, available=1, still=True, short="drop")
    large = assign(media(3000, 2000), made, available=1, still=True, short="drop")
    assert (str(small), str(large)) == ("1x192x288", "1x480x720")


@given(
    bucket_sets,
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from(SHORT_CLIPS),
)
def test_assign_gives_one_of_the_buckets_or_a_reason(made, width, height, available, still, short):
    result = assign(media(width, height), made, available=available, still=still, short=short)
    if isinstance(result, str):
        assert result
        return
    assert result in made
    assert not still or result.frames == 1
    assert still or short in ("loop", "pad_last") or result.frames <= available
    shuffled = assign(media(width, height), made[::-1], available=available, still=still, short=short)
    assert shuffled == result


def test_tokens_are_those_of_the_published_model():
    assert tokens(Bucket(frames=49, height=480, width=720)) == 17776  # 17550 + 226, CogVideoX 1.0
    assert tokens(Bucket(frames=1, height=480, width=720), shape=SequenceShape(text_length=0)) == 30 * 45


def test_cost_is_the_flops_of_a_layer_over_4d():
    n, d = 1000, 64
    weights = 4 * d * d + 8 * d * d  # q, k, v, out; the two of the feed-forward part
    attention = 2 * 2 * n * n * d  # scores and values, 2 FLOPs each
    assert 4 * d * step_cost(n, d) == 2 * n * weights + attention


@given(bucket_sets, st.integers(1, 64), st.sampled_from([64, 1920, 3072]))
def test_no_batch_costs_or_holds_more_than_the_costliest_and_none_could_be_larger(made, largest, width):
    got = batch_sizes(made, largest=largest, shape=SequenceShape(hidden_size=width))
    longest = max(made, key=tokens)
    most_tokens = largest * tokens(longest)
    most_cost = largest * step_cost(tokens(longest), width)
    assert set(got) == set(made)
    assert got[longest] == largest
    for bucket, n in got.items():
        assert n >= largest
        assert n * tokens(bucket) <= most_tokens
        assert n * step_cost(tokens(bucket), width) <= most_cost
        assert (n + 1) * tokens(bucket) > most_tokens or (n + 1) * step_cost(tokens(bucket), width) > most_cost


@given(
    bucket_sets,
    st.integers(1, 16),
    st.sampled_from([64, 1920, 3072]),
    st.integers(1, 60),
    st.booleans(),
)
def test_layers_and_checkpointing_cancel_out(made, largest, width, layers, checkpointing):
    def flops(bucket):
        n = tokens(bucket)
        return layers * (24 * n * width**2 + 4 * n**2 * width) * (4 if checkpointing else 3)

    def memory(bucket):  # bytes of activations in bf16
        return tokens(bucket) * width * (2 * layers + 34 if checkpointing else 34 * layers)

    longest = max(made, key=tokens)
    for bucket, n in batch_sizes(made, largest=largest, shape=SequenceShape(hidden_size=width)).items():
        assert n == min(largest * f(longest) // f(bucket) for f in (flops, memory))


def test_batches_by_cost_alone_are_those_of_the_documented_table():
    table = {1: (11, 0.54, 20, 0.98, 1.77), 17: (2, 0.55, 3, 0.83, 1.18), 33: (1, 0.59, 1, 0.59, 0.70),
             49: (1, 1.0, 1, 1.0, 1.0)}  # fmt: skip
    made = make_buckets(BucketConfig(frames=tuple(table)), VIDEO_SIZE, 49)
    most_tokens, most_cost = tokens(made[-1]), step_cost(tokens(made[-1]), 3072)
    for bucket, n in batch_sizes(made, largest=1, shape=SequenceShape()).items():
        cost = step_cost(tokens(bucket), 3072) / most_cost
        alone = int(1 / cost)
        row = n, round(n * cost, 2), alone, round(alone * cost, 2), round(alone * tokens(bucket) / most_tokens, 2)
        assert row == table[bucket.frames]


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(buckets).failed == 0
