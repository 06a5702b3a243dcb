"""Which buckets suit a data set: lengths that its clips fill, and sizes that its shapes fit. Pure.

A worked example. 60 clips lie (1920x1080) and 40 stand (1080x1920), and the model is made for 480x720. One size,
480x720, would cut 16 % off the lying ones and 63 % off the standing ones, 34 % on average. Two sizes of about the
same area, 432x768 and 768x432, cut nothing:

>>> choose_sizes([(1920, 1080)] * 60 + [(1080, 1920)] * 40, native=(480, 720))
[(768, 432), (432, 768)]
>>> choose_lengths([49] * 50 + [30] * 30 + [12] * 2 + [5], native=49)  # frames that clips fill at the model's rate
[9, 25, 49]
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sat_ext.data.buckets import DEFAULT_LENGTH_STEP

Size = tuple[int, int]  # height, width

MOST_SIZES = 5
LEAST_GAIN = 0.01  # of the picture, that one size more must save on average
RARE = 0.05  # of the clips: a length that fewer fill is left to the next shorter one
SMALLEST_AREA = 0.9  # of the native one
PREFERENCE = 0.002  # of the picture, that the native size may cut more than another
_WIDEST = 3.0  # of shapes, width over height or the reverse
_SHAPES = 400  # of the data, that are told apart


def choose_lengths(available: Sequence[float], native: int) -> list[int]:
    """Lengths of clips, from the shortest to the model's `native` one, for clips that fill so many frames.

    Empty where no clip fills the shortest, of 9 frames."""
    known = [*range(1 + DEFAULT_LENGTH_STEP, native, DEFAULT_LENGTH_STEP), native]
    filled = Counter(max((n for n in known if n <= frames), default=0) for frames in available)
    lengths = [n for n in known if filled[n]]
    for length in list(lengths[1:]):  # the shortest stays, or its clips would be stills
        if filled[length] < RARE * len(available):
            filled[lengths[lengths.index(length) - 1]] += filled[length]
            lengths.remove(length)
    return lengths


def choose_sizes(shapes: Sequence[Size], native: Size, multiple: int = 16, most: int = MOST_SIZES) -> list[Size]:
    """Up to `most` sizes of about the `native` area that cut least off pictures of these `shapes` (width, height).

    They are the best for their number, and one more would save less than `LEAST_GAIN` on average. Sides are
    multiples of `multiple`. The native size is preferred among those that cut as much."""
    sizes = candidates(native, multiple)
    log_size = np.log([width / height for height, width in sizes])
    log_shape = np.log([width / height for width, height in shapes])
    grid, weights = np.unique(np.round(log_shape * _SHAPES / 4) * 4 / _SHAPES, return_counts=True)
    cut = 1 - np.exp(-abs(grid[:, None] - log_size[None]))  # (shapes, sizes): what each size cuts off each shape
    other = np.array([size != native for size in sizes])
    costs = weights[:, None] / weights.sum() * (cut + PREFERENCE * other)
    best: list[int] = []
    before = math.inf
    for number in range(1, min(most, len(sizes)) + 1):
        cost, chosen = _best_of(costs, grid, log_size, number)
        if before - cost < LEAST_GAIN:
            break
        before, best = cost, chosen
    return [sizes[i] for i in best]


def candidates(native: Size, multiple: int) -> list[Size]:
    """Sizes (height, width) by rising width over height: the native one, and all of hardly less area."""
    area = native[0] * native[1]
    found = {native[1] / native[0]: native}
    for width in range(multiple, math.isqrt(int(area * _WIDEST)) + 1, multiple):
        for height in range(area // width // multiple * multiple, 0, -multiple):
            if width * height < SMALLEST_AREA * area:
                break
            if 1 / _WIDEST <= width / height <= _WIDEST:
                found.setdefault(width / height, (height, width))
    return [found[shape] for shape in sorted(found)]


def _best_of(costs: np.ndarray, grid: np.ndarray, log_size: np.ndarray, number: int) -> tuple[float, list[int]]:
    """The cost and the indices of the best `number` sizes.

    Each shape goes to the size nearest to it, so the shapes of a size lie together, and what is best below a size
    does not depend on what lies above it."""
    count = len(log_size)
    # between[i, j]: the cost of the shapes between the sizes i and j; -1 and `count` stand for no size
    nearest = np.concatenate([[-math.inf], log_size, [math.inf]])
    padded = np.concatenate([np.full((len(grid), 1), np.inf), costs, np.full((len(grid), 1), np.inf)], axis=1)

    def between(i: int, j: int) -> float:
        inside = (grid > nearest[i]) & (grid <= nearest[j])
        return float(np.minimum(padded[inside, i], padded[inside, j]).sum())

    table = {(i, j): between(i, j) for i in range(count + 1) for j in range(i + 1, count + 2)}
    reached = {i: (table[0, i], [i]) for i in range(1, count + 1)}
    for _ in range(number - 1):
        reached = {
            j: min((cost + table[i, j], [*path, j]) for i, (cost, path) in reached.items() if i < j)
            for j in range(1, count + 1)
            if any(i < j for i in reached)
        }
    cost, path = min((cost + table[i, count + 1], path) for i, (cost, path) in reached.items())
    return cost, [i - 1 for i in path]
