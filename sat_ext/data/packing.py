"""Which sizes of samples share a pack, so that packs are full, alike, and hold the mix. Pure.

A window of the schedule holds a fixed number of samples of each size (in tokens), which `pack` puts into packs of
at most `budget` tokens. The next pack is the one, of all combinations that fit, after which the samples packed so
far are nearest to their shares, and which leaves the least of the budget empty.
"""

from collections.abc import Sequence

import numpy as np

MOST_PATTERNS = 20_000  # combinations that are compared for each pack; 0.2 ms with 8 sizes
AROUND = 16  # counts of a size that are considered, on each side of the usual one
# What an empty budget weighs against a share that is off by one sample. On the mixes of benchmarks/schedule.py
# packs are 90 to 98 % full with 1, and 97 to 99 % with 10, where shares are off by up to 3 samples instead of 2.
EMPTY = 10.0


def pack(slots: Sequence[int], sizes: Sequence[int], budget: int, most: Sequence[int] | None = None) -> np.ndarray:
    """The packs in order, int64 (packs, sizes): how many samples of each size they hold.

    `sizes` are tokens, falling, none above `budget`; `slots` are the samples of each, and `most` is how many of
    each a pack may have.

    >>> pack([2, 2, 4], [9, 5, 2], budget=11).tolist()
    [[1, 0, 1], [0, 1, 3], [1, 0, 0], [0, 1, 0]]
    """
    left = np.array(slots, dtype=np.int64)
    tokens = np.array(sizes, dtype=np.float64)
    assert left.sum() > 0 and left.min() >= 0 and (np.diff(tokens) < 0).all() and tokens[0] <= budget
    share = left / left.sum()
    samples = budget / (tokens @ share)  # in a full pack
    # what a pattern adds to how far each size is off its share: in parts of the budget, and in samples
    scale = tokens / budget + 1 / samples
    limits = [budget // size for size in sizes] if most is None else list(most)
    patterns = _patterns(sizes, budget, limits, samples * share, scale)
    change = (patterns - patterns.sum(1, keepdims=True) * share) * scale
    fixed = (change**2).sum(1) + EMPTY * (1 - patterns @ tokens / budget)
    off = np.zeros(len(left))
    packs = []
    while left.any():
        score = fixed + 2 * (change @ off)
        score[(patterns > left).any(1)] = np.inf
        best = int(np.argmin(score))
        made = patterns[best] if score[best] < np.inf else _rest(np.minimum(left, limits), sizes, budget)
        off += (made - made.sum() * share) * scale
        left -= made
        packs.append(made)
    return np.array(packs)


def _patterns(
    sizes: Sequence[int], budget: int, limits: Sequence[int], usual: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """Combinations that fit in `budget`, int64 (n, sizes), of each size none or about as many as `usual`: where
    they are too many, those nearest to it."""
    made, room = np.zeros((1, 0), np.int64), np.array([budget])
    for k, (size, limit, middle) in enumerate(zip(sizes, limits, usual, strict=True), start=1):
        counts = np.arange(max(1, min(int(middle), limit) - AROUND), min(limit, int(middle) + AROUND) + 1)
        counts = np.concatenate([[0], counts])
        rows, which = np.nonzero(counts[None] * size <= room[:, None])
        made = np.concatenate([made[rows], counts[which][:, None]], axis=1)
        room = room[rows] - counts[which] * size
        if len(made) > MOST_PATTERNS:
            off = (((made - usual[:k]) * scale[:k]) ** 2).sum(1)
            near = np.argsort(off, kind="stable")[:MOST_PATTERNS]
            made, room = made[near], room[near]
    return made[made.any(1)]


def _rest(left: np.ndarray, sizes: Sequence[int], budget: int) -> np.ndarray:
    """The largest of what is left, where no combination has so few."""
    made = np.zeros_like(left)
    for i, size in enumerate(sizes):
        made[i] = min(left[i], budget // size)
        budget -= int(made[i]) * size
    return made
