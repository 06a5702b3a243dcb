"""Which bucket, and which records, at any step: a pure function of (cells, shares, seed, world, step).

A *cell* is the records of one source that fall into one bucket. Every step takes one batch per rank from one
cell, so all ranks see the same bucket at the same step. Positions are counted in samples: the first `used`
positions of a cell's stream have been trained on, and the stream is a chain of permutations of the cell's
records. The whole state is therefore one integer per cell, and does not depend on the number of ranks.

The order of steps comes from ideal times, so that no state has to be replayed:

- inside a source, the batch that starts at position p of a cell of n records and takes g samples is due at
  source time (p + g/2) * N / n, where N is the number of records of the source: cells advance in proportion
  to their sizes, and reach the end of an epoch together (within one batch);
- between sources, a batch is due when the samples of the source, counted to the middle of the batch and
  divided by the source's share, are the fewest.

Worked example: two sources of share 0.75 and 0.25, one cell each, batches of 1 sample on 1 rank. The batches
are due at (0.5, 1.5, 2.5, ...) / 0.75 = 0.67, 2, 3.33, ... and at (0.5, 1.5, ...) / 0.25 = 2, 6, ...; ties go
to the first source, so the steps are A A B A, A A B A, ...

With G the largest global batch of each source and p its share, the samples of a source in the first t steps
differ from p times all samples by at most ((1 - p) G + p * (sum of the other sources' G)) / 2; over any window
of steps by at most twice that, which for two sources is one batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

FEISTEL_ROUNDS = 4  # Luby and Rackoff 1988: four rounds give a strong pseudo-random permutation
_SPLITMIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The records of one source in one bucket; `batch` is the number of samples per rank and step."""

    source: str
    bucket: Bucket
    records: int
    batch: int


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-step: the index of its cell, and the position in that cell of its first sample."""

    cell: int
    first: int


class Schedule:
    """The steps of a run. `used` (samples per cell, from `state`) continues an earlier run on any `world`.

    Raises `ConfigError` when a share is not positive, or names a source that has no records.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        shares: Mapping[str, float],
        *,
        seed: int,
        world: int,
        used: Sequence[int] | None = None,
    ) -> None:
        assert cells and world > 0 and all(c.records > 0 and c.batch > 0 for c in cells)
        self.cells = tuple(cells)
        self.seed, self.world = seed, world
        self.base = tuple(used) if used is not None else (0,) * len(cells)
        assert len(self.base) == len(self.cells)
        _check_shares(shares, {c.source for c in cells})
        names = list(dict.fromkeys(c.source for c in cells))
        total = sum(shares[n] for n in names)
        self._shares = [shares[n] / total for n in names]
        self._members = [[i for i, c in enumerate(cells) if c.source == n] for n in names]
        self._global = [c.batch * world for c in cells]
        size = {n: sum(c.records for c in cells if c.source == n) for n in names}
        self._stretch = [size[c.source] / c.records for c in cells]  # source time per sample of the cell
        self._keys = [_key(seed, c.source, str(c.bucket)) for c in cells]

    def state(self, step: int) -> tuple[int, ...]:
        """Samples used per cell before `step`; give it to another `Schedule` as `used` to go on from there."""
        used, done = list(self.base), 0
        if step > 0:
            used, done = self._prefix_before(step)
        for _ in range(step - done):
            cell = self._due(used)
            used[cell] += self._global[cell]
        return tuple(used)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """The endless sequence of steps from `start` on. Finding the start needs no replay."""
        used = list(self.state(start))
        while True:
            cell = self._due(used)
            yield Step(cell, used[cell])
            used[cell] += self._global[cell]

    def positions(self, step: Step, rank: int) -> np.ndarray:
        """Positions (int64, one per sample of the batch) that `rank` takes from the step's cell."""
        batch = self.cells[step.cell].batch
        return step.first + rank * batch + np.arange(batch, dtype=np.int64)

    def records(self, cell: int, positions: np.ndarray) -> np.ndarray:
        """Indices (int64, 0 <= i < records) of the cell's records at `positions` of its stream.

        Every epoch visits the same random half first and the other half second, each in a new order: then two
        visits of one record are more than half an epoch apart, and a batch that crosses the end of an epoch
        holds no record twice (as long as it takes at most half of the records).
        """
        n, key = self.cells[cell].records, self._keys[cell]
        epoch, place = np.divmod(np.asarray(positions, dtype=np.int64), n)
        half = n // 2
        out = np.empty_like(place)
        for second, low, size in ((False, 0, half), (True, half, n - half)):
            chosen = (place >= half) == second
            if chosen.any():
                keys = _mix(epoch[chosen].astype(np.uint64) * np.uint64(2) + np.uint64(second + 1)) ^ key
                out[chosen] = low + permute(place[chosen] - low, size, keys)
        return permute(out, n, np.full(out.shape, key))

    def rng(self, cell: int, position: int, attempt: int = 0) -> np.random.Generator:
        """The random numbers of one visit (which part of a clip, say): the same on every machine and rank.

        `attempt` counts the files tried before, which could not be read.
        """
        return np.random.default_rng([int(self._keys[cell]), position, attempt])

    def _due(self, used: Sequence[int]) -> int:
        """The cell whose batch is due next."""
        best, best_time = -1, math.inf
        for share, members in zip(self._shares, self._members):
            cell = min(members, key=lambda c: self._source_time(c, used[c]))
            time = self._time(share, members, cell, used)
            if time < best_time:
                best, best_time = cell, time
        return best

    def _source_time(self, cell: int, position: int) -> float:
        return (position + self._global[cell] / 2) * self._stretch[cell]

    def _time(self, share: float, members: Sequence[int], cell: int, used: Sequence[int]) -> float:
        return (sum(used[c] for c in members) + self._global[cell] / 2) / share

    def _prefix_before(self, step: int) -> tuple[list[int], int]:
        """A state of the schedule at most a few cells' worth of steps before `step`, in closed form.

        At global time T every source has done exactly the batches that are due by then. The number of steps
        done by T grows like `rate` * T, give or take a batch per cell, so a T just before `step` is known.
        """
        rate = sum(
            share * sum(1 / (self._global[c] * self._stretch[c]) for c in members)
            for share, members in zip(self._shares, self._members)
        )
        slack = len(self.cells) + len(self._shares)
        time = sum(self.base) + (step - slack) / rate
        while True:
            used = list(self.base)
            for share, members in zip(self._shares, self._members):
                self._advance(used, share, members, time)
            done = sum((u - b) // g for u, b, g in zip(used, self.base, self._global))
            if done <= step:
                return used, done
            time -= (done - step + slack) / rate

    def _advance(self, used: list[int], share: float, members: Sequence[int], time: float) -> None:
        """Move one source, in place, to its state at global `time`."""
        limit = share * time - sum(self._global[c] for c in members)
        for c in members:
            # a batch more or less by rounding does not matter: the walk below ends at the exact place
            done = math.floor((limit / self._stretch[c] - self.base[c]) / self._global[c] - 0.5)
            used[c] += max(0, done) * self._global[c]
        if sum(used[c] for c in members) > share * time:  # only where the base itself runs ahead
            for c in members:
                used[c] = self.base[c]
        while True:
            cell = min(members, key=lambda c: self._source_time(c, used[c]))
            if self._time(share, members, cell, used) > time:
                return
            used[cell] += self._global[cell]


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Map `values` (int64, 0 <= v < size) through pseudo-random permutations of range(size), one key each.

    A Feistel network over the next even power of two, walked until it lands below `size` (Black and Rogaway
    2002, cycle walking): constant time and memory for any size.
    """
    if size <= 1:
        return np.zeros_like(values)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    out = values.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        v, k = out[outside], keys[outside]
        left, right = v >> half_bits, v & mask
        for i in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(k + np.uint64(i))) & mask)
        out[outside] = (left << half_bits) | right
        outside = out >= size
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) on a uint64 array, which wraps silently."""
    x = x + _SPLITMIX[0]
    x = (x ^ (x >> np.uint64(30))) * _SPLITMIX[1]
    x = (x ^ (x >> np.uint64(27))) * _SPLITMIX[2]
    return x ^ (x >> np.uint64(31))


def _key(*parts: object) -> np.uint64:
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _check_shares(shares: Mapping[str, float], sources: set[str]) -> None:
    for name in sources:
        if not shares.get(name, 0) > 0:
            raise ConfigError(
                f"data.params.sources: the share of '{name}' is {shares.get(name)!r}; give a number above 0, "
                "or take the source out."
            )
    for name in shares:
        if name not in sources:
            raise ConfigError(
                f"data.params.sources: '{name}' has a share but no record that fits a bucket; "
                "check its path and data.params.buckets."
            )
