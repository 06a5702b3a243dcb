"""Which shapes batches have, which shape a file gets, and how many samples of it make a batch. Pure.

CogVideoX's VAE has 8 times fewer pixels a side and 4 times fewer frames after the first, and its transformer takes
patches of 2 x 2 latents (Yang et al. 2024, "CogVideoX", section 2). So sizes are multiples of 16, and clips have
4k+1 frames.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sat_ext.cogvideox import TEMPORAL_COMPRESSION, TOKEN_SIDE, SequenceShape, tokens
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket, MediaInfo

# Frames between the default bucket lengths: 1 s at CogVideoX's 8 fps, so that a clip of one second stays a clip.
# 8k+1 frames make an odd number of latents, to which 1.5 adds the padding latent that it was trained with.
DEFAULT_LENGTH_STEP = 8
DEFAULT_RATIOS = (9 / 16, 3 / 4, 1.0, 4 / 3, 16 / 9)  # what cameras and phones make, upright and lying

_FRAMES, _SIZES = "data.params.buckets.frames", "data.params.buckets.sizes"


@dataclass(frozen=True, kw_only=True, slots=True)
class AreaConfig:
    """Sizes by area: `ratios` are width / height, `area` is the most pixels a size may have."""

    area: int | None = None
    ratios: tuple[float, ...] = DEFAULT_RATIOS


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketConfig:
    """`data.params.buckets`; `sizes` are (height, width) in pixels, or an area and ratios."""

    frames: tuple[int, ...] | None = None
    sizes: tuple[tuple[int, int], ...] | AreaConfig | None = None


def make_buckets(
    config: BucketConfig, video_size: tuple[int, int] | None, max_num_frames: int | None
) -> tuple[Bucket, ...]:
    """Every length with every size, sorted, each once.

    `video_size` (height, width) and `max_num_frames` give what `config` leaves out. Raises `ConfigError` for what
    cannot be, naming the nearest value that can, and for what neither gives.

    >>> [str(b) for b in make_buckets(BucketConfig(), (480, 720), 41)]
    ['1x480x720', '9x480x720', '17x480x720', '25x480x720', '33x480x720', '41x480x720']
    >>> by_area = BucketConfig(frames=(49,), sizes=AreaConfig(area=345600, ratios=(1.5, 1.0)))
    >>> [str(b) for b in make_buckets(by_area, None, None)]
    ['49x480x720', '49x576x576']
    """
    lengths = _lengths(config.frames, max_num_frames)
    sizes = _sizes(config.sizes, video_size)
    return tuple(sorted({Bucket(frames=t, height=h, width=w) for t, (h, w) in itertools.product(lengths, sizes)}))


def assign(info: MediaInfo, buckets: Sequence[Bucket], *, available: int, still: bool, short: str) -> Bucket | str:
    """The bucket for a file, or why it has none, as a clause to put after the file's name.

    `available` is `clips.available_frames`, `still` asks for one frame (a file of one frame is always a still),
    and `short` is one of `SHORT_CLIPS`. Among the sizes of the chosen length the one nearest in shape wins, then
    the one nearest in area.
    """
    lengths = {b.frames for b in buckets}
    longest, shortest = max(lengths), min(lengths)
    if still or info.kind == "image":
        length = 1
        if 1 not in lengths:
            return "a still, but no bucket has 1 frame"
    elif short == "shorter_bucket":
        length = max((n for n in lengths if n <= available), default=0)
        if not length:
            return f"too short for the shortest bucket ({available} of {shortest} frames)"
    else:
        length = longest
        if short == "drop" and available < longest:
            return f"too short for the longest bucket ({available} of {longest} frames), and short_clips is drop"

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


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """How large a rank's steps are: packs of up to `budget` tokens, or without one `batches` samples of
    one bucket. `tokens` are those of one sample."""

    tokens: Mapping[Bucket, int]
    batches: Mapping[Bucket, int]
    budget: int | None = None

    @staticmethod
    def of(batches: Mapping[Bucket, int]) -> "StepSize":
        """Steps of one bucket, with so many samples, whatever their tokens."""
        return StepSize(tokens=dict.fromkeys(batches, 1), batches=batches)

    def most(self, bucket: Bucket) -> int:
        """Samples of a bucket that a step can have."""
        return self.batches[bucket] if self.budget is None else self.budget // self.tokens[bucket]

    def most_pixels(self, buckets: Iterable[Bucket]) -> int:
        """Pixels of the largest step of these buckets, or a few more."""
        pixels = {b: b.frames * b.height * b.width for b in buckets}
        if self.budget is None:
            return max(self.batches[b] * n for b, n in pixels.items())
        return int(self.budget * max(n / self.tokens[b] for b, n in pixels.items()))

    def fullest(self, bucket: Bucket) -> dict[Bucket, int]:
        """The largest step with this bucket: as many of its samples as fit and, in a pack, the smallest beside."""
        step = {bucket: self.most(bucket)}
        if self.budget is not None:
            smallest = min(self.tokens, key=lambda b: self.tokens[b])
            left = (self.budget - step[bucket] * self.tokens[bucket]) // self.tokens[smallest]
            if left:
                step[smallest] = step.get(smallest, 0) + left
        return step


def pack_budget(buckets: Sequence[Bucket], *, largest: int, shape: SequenceShape) -> int:
    """Tokens of a pack: `largest` samples of the costliest bucket, and as many stills where there are clips too.

    >>> buckets = make_buckets(BucketConfig(frames=(1, 49)), (480, 720), 49)
    >>> pack_budget(buckets, largest=1, shape=SequenceShape())  # 1.09 times a clip alone
    19352
    """
    length = {bucket: tokens(bucket, shape) for bucket in buckets}
    stills = [n for bucket, n in length.items() if bucket.frames == 1]
    mixed = len(stills) < len(length)
    return largest * (max(length.values()) + (max(stills) if stills and mixed else 0))


def batch_sizes(buckets: Sequence[Bucket], *, largest: int, shape: SequenceShape) -> dict[Bucket, int]:
    """Samples per batch and rank for each bucket: as many as cost no more than `largest` of the costliest bucket
    (`step_cost`) and hold no more tokens.

    Tokens stand for memory: for each, a batch keeps some bytes in each of the L layers (34 d without attention's
    scores, which flash attention does not keep; 2 d with gradient checkpointing) and in the one layer that is
    recomputed (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", table 2).
    L, the bytes, and the passes of a step (3 forward passes, 4 with checkpointing) are the same for all buckets
    and cancel out. A token of a long sequence costs more than one of a short, so memory limits the smaller
    buckets, whose steps are then cheaper. `docs/data.md` has the table for 5B.

    >>> buckets = make_buckets(BucketConfig(frames=(1, 17, 33, 49)), (480, 720), 49)
    >>> list(batch_sizes(buckets, largest=1, shape=SequenceShape()).values())
    [11, 2, 1, 1]
    """
    assert buckets and largest >= 1
    length = {b: tokens(b, shape) for b in buckets}
    cost = {b: step_cost(length[b], shape.hidden_size) for b in buckets}
    most_tokens, most_cost = largest * max(length.values()), largest * max(cost.values())
    return {b: min(most_tokens // length[b], int(most_cost // cost[b])) for b in buckets}


def _lengths(frames: Sequence[int] | None, longest: int | None) -> Sequence[int]:
    where = _FRAMES
    if frames is None:
        if longest is None:
            raise ConfigError(f"data.params.max_num_frames: missing, and there is no {_FRAMES}; add one of them.")
        where, frames = "data.params.max_num_frames", (*range(1, longest, DEFAULT_LENGTH_STEP), longest)
    if not frames:
        raise ConfigError(f"{_FRAMES}: the list is empty; name a length, or leave the key out.")
    for length in frames:
        below = max(1, (length - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1)
        if length != below:
            near = f"{below} or {below + TEMPORAL_COMPRESSION}" if length > 1 else "1"
            raise ConfigError(f"{where}: {length} frames cannot be encoded (1, 5, 9, ... can); use {near}.")
    return frames


def _sizes(
    sizes: Sequence[tuple[int, int]] | AreaConfig | None, video_size: tuple[int, int] | None
) -> Sequence[tuple[int, int]]:
    where = _SIZES
    if isinstance(sizes, AreaConfig):
        if not sizes.ratios:
            raise ConfigError(f"{_SIZES}.ratios: the list is empty; name a ratio, or leave the key out.")
        area = sizes.area if sizes.area is not None else math.prod(_required(video_size))
        return [_size_of(area, ratio) for ratio in sizes.ratios]
    if sizes is None:
        where, sizes = "data.params.video_size", (_required(video_size),)
    if not sizes:
        raise ConfigError(f"{_SIZES}: the list is empty; name a size [height, width], or leave the key out.")
    for size in sizes:
        nearest = [max(1, math.floor(side / TOKEN_SIDE + 0.5)) * TOKEN_SIDE for side in size]
        if list(size) != nearest:
            raise ConfigError(
                f"{where}: {list(size)} (height, width) is not in multiples of {TOKEN_SIDE}; use {nearest}."
            )
    return sizes


def _required(video_size: tuple[int, int] | None) -> tuple[int, int]:
    if video_size is None:
        raise ConfigError(f"data.params.video_size: missing, and there is no {_SIZES}; add one of them.")
    return video_size


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
