"""Which shapes batches have, which shape a file gets, and how many samples of it make a batch. Pure.

CogVideoX's VAE has 8 times fewer pixels a side and 4 times fewer frames after the first, and its transformer takes
patches of 2 x 2 latents (Yang et al. 2024, "CogVideoX", section 2). So sizes are multiples of 16, and clips have
4k+1 frames.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sat_ext.cogvideox import TEMPORAL_COMPRESSION, TOKEN_SIDE, SequenceShape, tokens
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket, MediaInfo

# Frames between the default bucket lengths: 1 s at CogVideoX's 8 fps, so that a clip of one second stays a clip.
# 8k+1 frames make an odd number of latents, to which 1.5 adds the padding latent that it was trained with.
DEFAULT_LENGTH_STEP = 8
DEFAULT_RATIOS = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)  # what cameras and phones make, upright and lying

_SIZES = "data.params.buckets.sizes"


@dataclass(frozen=True, kw_only=True, slots=True)
class AreaConfig:
    """Sizes by area: `ratios` are width / height, `area` is the most pixels a size may have."""

    area: int | None = None
    ratios: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketConfig:
    """`data.params.buckets`; the defaults follow from `video_size` and `max_num_frames`.

    `sizes` are (height, width) in pixels, or an area and ratios.
    """

    frames: tuple[int, ...] | None = None
    sizes: tuple[tuple[int, int], ...] | AreaConfig | None = None


def make_buckets(
    config: BucketConfig, video_size: tuple[int, int] | None, max_num_frames: int | None
) -> tuple[Bucket, ...]:
    """Every length with every size, sorted, each once.

    `video_size` (height, width) and `max_num_frames` give what `config` leaves out. Raises `ConfigError`, naming
    the nearest value that works, for a length that is not 4k+1, a side that is not a multiple of 16, an area or a
    ratio that gives no size, and if neither `config` nor the others give a value.

    >>> [str(b) for b in make_buckets(BucketConfig(), (480, 720), 41)]
    ['1x480x720', '9x480x720', '17x480x720', '25x480x720', '33x480x720', '41x480x720']
    >>> by_area = BucketConfig(frames=(49,), sizes=AreaConfig(area=345600, ratios=(1.5, 1.0)))
    >>> [str(b) for b in make_buckets(by_area, (480, 720), 49)]
    ['49x480x720', '49x576x576']
    """
    lengths = config.frames
    if lengths is None:
        lengths = _default_lengths(max_num_frames)
    if not lengths:
        raise ConfigError("data.params.buckets.frames: the list is empty; name a length, or leave the key out.")
    for length in lengths:
        _check_length(length, "data.params.buckets.frames")
    sizes = _sizes(config, video_size)
    return tuple(sorted({Bucket(frames=t, height=h, width=w) for t, (h, w) in itertools.product(lengths, sizes)}))


def assign(info: MediaInfo, buckets: Sequence[Bucket], *, available: int, still: bool, short: str) -> Bucket | str:
    """The bucket for a file, or why it has none, as a clause to put after the file's name.

    `available` is `clips.available_frames`, `still` asks for one frame (a file of one frame is always a still),
    and `short` is one of `SHORT_CLIPS`. Among the sizes of the chosen length the one nearest in shape wins (the
    smallest
    |log(file's ratio / size's ratio)|), then the one nearest in area.

    >>> clip = MediaInfo(width=1280, height=720, frames=120, fps=30.0, duration=4.0, codec="h264")
    >>> buckets = make_buckets(BucketConfig(sizes=((480, 720), (720, 480))), (480, 720), 49)
    >>> str(assign(clip, buckets, available=33, still=False, short="shorter_bucket"))
    '33x480x720'
    >>> assign(clip, buckets, available=33, still=False, short="drop")
    'too short for the longest bucket (33 of 49 frames), and short_clips is drop'
    """
    lengths = sorted({b.frames for b in buckets})
    if still or info.kind == "image":
        length: int | str = 1 if 1 in lengths else "a still, but no bucket has 1 frame"
    else:
        length = _LENGTHS[short](available, lengths)
    if isinstance(length, str):
        return length

    def distance(bucket: Bucket) -> tuple[float, float, Bucket]:
        shape = math.log(info.width / info.height * bucket.height / bucket.width)
        area = math.log(info.width * info.height / (bucket.width * bucket.height))
        return round(abs(shape), 9), abs(area), bucket  # rounded: equal shapes differ in their last bit

    return min((b for b in buckets if b.frames == length), key=distance)


def step_cost(tokens: int, hidden_size: int) -> float:
    """Work of one sample, for comparing buckets: FLOPs of one layer's forward pass / (4 * hidden_size).

    A layer of width d costs 24 n d^2 for its linear parts and 4 n^2 d for attention over n tokens (Narayanan
    et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", appendix). Backward and the
    number of layers multiply all buckets alike, so n (6 d + n) is what remains.

    >>> round(step_cost(17776, 3072) / step_cost(1576, 3072), 1)  # a clip of 49 frames against a still
    20.4
    """
    return float(tokens) * (6 * hidden_size + tokens)


def batch_sizes(buckets: Sequence[Bucket], *, largest: int, shape: SequenceShape) -> dict[Bucket, int]:
    """Samples per batch and rank for each bucket, where the costliest bucket gets `largest`.

    A bucket gets as many samples as cost no more than that batch (`step_cost`) and hold no more tokens, which
    stand for memory: for each token, a batch keeps some bytes in each of the L layers (34 d without attention's
    scores, which flash attention does not keep; 2 d with gradient checkpointing) and in the one layer that is
    recomputed (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", table 2).
    The VAE encoder sees no more pixels a token in short buckets than in long ones. L, the bytes, and the passes of
    a step (3 forward passes, 4 with checkpointing) are the same for all buckets and cancel out: width and tokens
    decide.

    A token of a long sequence costs more than one of a short, so memory limits the smaller buckets, whose steps
    are then cheaper. No rank waits for another because of it: in a step all have the same bucket. `docs/data.md`
    has the table for 5B, and what to write instead of `{cost: auto}` if there is memory to spare. Samples of all
    buckets count alike in the loss either way (`Schedule.loss_weight`).

    >>> buckets = make_buckets(BucketConfig(frames=(1, 17, 33, 49)), (480, 720), 49)
    >>> sizes = batch_sizes(buckets, largest=1, shape=SequenceShape())
    >>> {str(b): n for b, n in sizes.items()}
    {'1x480x720': 11, '17x480x720': 2, '33x480x720': 1, '49x480x720': 1}
    >>> most = step_cost(17776, 3072)
    >>> [round(n * step_cost(tokens(b), 3072) / most, 2) for b, n in sizes.items()]
    [0.54, 0.55, 0.59, 1.0]
    """
    assert buckets and largest >= 1
    length = {b: tokens(b, shape) for b in buckets}
    cost = {b: step_cost(length[b], shape.hidden_size) for b in buckets}
    most_tokens, most_cost = largest * max(length.values()), largest * max(cost.values())
    return {b: min(most_tokens // length[b], int(most_cost // cost[b])) for b in buckets}


def _default_lengths(longest: int | None) -> tuple[int, ...]:
    if longest is None:
        raise ConfigError(
            "data.params.max_num_frames: missing, and there is no data.params.buckets.frames; add one of them."
        )
    _check_length(longest, "data.params.max_num_frames")
    return (*range(1, longest, DEFAULT_LENGTH_STEP), longest)


def _check_length(frames: int, where: str) -> None:
    below = max(1, (frames - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1)
    if frames != below:
        near = f"{below} or {below + TEMPORAL_COMPRESSION}" if frames > 1 else "1"
        raise ConfigError(f"{where}: {frames} frames cannot be encoded (1, 5, 9, ... can); use {near}.")


def _sizes(config: BucketConfig, video_size: tuple[int, int] | None) -> list[tuple[int, int]]:
    if isinstance(config.sizes, AreaConfig):
        area = config.sizes.area if config.sizes.area is not None else math.prod(_required(video_size))
        ratios = config.sizes.ratios if config.sizes.ratios is not None else DEFAULT_RATIOS
        if not ratios:
            raise ConfigError(f"{_SIZES}.ratios: the list is empty; name a ratio, or leave the key out.")
        return [_size_of(area, ratio) for ratio in ratios]
    if config.sizes is None:
        size = _required(video_size)
        _check_size(size, "data.params.video_size")
        return [size]
    if not config.sizes:
        raise ConfigError(f"{_SIZES}: the list is empty; name a size [height, width], or leave the key out.")
    for size in config.sizes:
        _check_size(size, _SIZES)
    return list(config.sizes)


def _required(video_size: tuple[int, int] | None) -> tuple[int, int]:
    if video_size is None:
        raise ConfigError(f"data.params.video_size: missing, and there is no {_SIZES}; add one of them.")
    return video_size


def _check_size(size: tuple[int, int], where: str) -> None:
    nearest = [max(1, math.floor(side / TOKEN_SIDE + 0.5)) * TOKEN_SIDE for side in size]
    if list(size) != nearest:
        raise ConfigError(
            f"{where}: {list(size)} (height, width) is not in multiples of {TOKEN_SIDE}; use {nearest}."
        )


def _size_of(area: int, ratio: float) -> tuple[int, int]:
    """The (height, width) in steps of 16 nearest to `ratio` and to `area`, and not above `area`."""
    if not (ratio > 0 and math.isfinite(ratio)):
        raise ConfigError(f"{_SIZES}.ratios: {ratio} is not a width / height; use a number above 0, such as 1.5.")
    least = math.ceil(TOKEN_SIDE**2 * max(ratio, 1 / ratio))
    if area < least:
        raise ConfigError(
            f"{_SIZES}.area: {area} pixels are too few for the ratio {ratio:g}; use {least} or more."
        )
    rows = math.sqrt(area / ratio) / TOKEN_SIDE
    candidates = [
        (h, w)
        for h in range(round(rows) - 1, round(rows) + 2)
        for w in range(round(rows * ratio) - 1, round(rows * ratio) + 2)
        if h > 0 and w > 0 and h * w * TOKEN_SIDE**2 <= area
    ]

    def loss(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        shape = abs(math.log(size[1] / size[0] / ratio))  # counts double: it crops every file
        pixels = math.log(area / (size[0] * size[1] * TOKEN_SIDE**2))
        return round(2 * shape + pixels, 9), size

    height, width = min(candidates, key=loss)
    return height * TOKEN_SIDE, width * TOKEN_SIDE


def _fitting_length(available: int, lengths: Sequence[int]) -> int | str:
    fitting = [n for n in lengths if n <= available]
    return fitting[-1] if fitting else f"too short for the shortest bucket ({available} of {lengths[0]} frames)"


def _longest_or_dropped(available: int, lengths: Sequence[int]) -> int | str:
    if available >= lengths[-1]:
        return lengths[-1]
    return f"too short for the longest bucket ({available} of {lengths[-1]} frames), and short_clips is drop"


# The length, of the rising `lengths`, for a clip of `available` frames, by the name of the policy.
_LENGTHS: dict[str, Callable[[int, Sequence[int]], int | str]] = {
    "shorter_bucket": _fitting_length,
    "loop": lambda available, lengths: lengths[-1],
    "pad_last": lambda available, lengths: lengths[-1],
    "drop": _longest_or_dropped,
}
