"""Which bucket, and which records, at any step: a pure function of (cells, shares, seed, world, step).

A *cell* is the records of one source that fall into one bucket. Every step takes one batch per rank from one cell,
so all ranks see the same bucket at the same step. Positions count samples: a cell's stream is a chain of
permutations of its records, of which the first `used` positions have been trained on. So the whole state is one
integer per cell, and does not depend on the number of ranks.

The order of steps follows from ideal times, so that no state must be replayed:

- within a source, the batch of g samples at position p of a cell of n records is due at source time
  (p + g/2) * N / n, where N is the number of the source's records: cells advance in proportion to their sizes and
  reach the end of an epoch together (within one batch);
- between sources, the one is due whose samples, counted to the middle of its next batch and divided by its share,
  are the fewest.

Example: two sources of share 0.75 and 0.25, one cell each, batches of 1 sample on 1 rank. The batches are due at
(0.5, 1.5, 2.5, ...) / 0.75 = 0.67, 2, 3.33, ... and at (0.5, 1.5, ...) / 0.25 = 2, 6, ...; ties go to the first
source, so the steps are A A B A, A A B A, ...

With G the largest global batch of each source and p its share, the samples of a source in the first t steps differ
from p times all samples by at most ((1 - p) G + p * (sum of the other sources' G)) / 2, and over any window of
steps by at most twice that, which for two sources is one batch.
"""

import hashlib
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sat_ext.types import Bucket

FEISTEL_ROUNDS = 4  # Luby and Rackoff 1988: four rounds give a strong pseudo-random permutation
_SPLITMIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The `records` (visits an epoch) of one source in one bucket; `batch` is samples per rank and step."""

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
    """The steps of a run. `used` (samples per cell, from `state`) continues an earlier run on any `world`."""

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
        names = list(dict.fromkeys(c.source for c in cells))
        assert shares.keys() == set(names) and min(shares.values()) > 0, shares  # `build_index` has checked them
        total = sum(shares[n] for n in names)
        self._sources = [_Source(shares[n] / total, n, self.cells, world) for n in names]
        # By name, so that a resumed run reads a cell in the same order, whatever cells were added or left out.
        self._keys = [_key(seed, c.source, str(c.bucket)) for c in cells]
        per_batch = sum(source.rate * world for source in self._sources)
        self._weights = [c.batch * per_batch for c in cells]

    def loss_weight(self, cell: int) -> float:
        """The factor on the loss of a step of `cell` (a mean over its batch) that makes all samples count alike.

        Let f_j be the part of all samples in cell j and B_j its batch. The number of its steps is proportional to
        f_j / B_j, and with weight w_j a sample moves the model by w_j / B_j. Equal samples require w_j = K B_j; a
        mean weight of 1 over the steps, which keeps the meaning of the learning rate, fixes K:

            w_c = B_c * sum over j of f_j / B_j

        Two sources of share 0.5, in batches of 11 stills and of 1 clip: the sum is 0.5 / 11 + 0.5 = 6 / 11, so
        steps of stills weigh 6 and of clips 6 / 11; the 11 clips in 12 steps weigh as much as the 11 stills.
        """
        return self._weights[cell]

    def state(self, step: int) -> tuple[int, ...]:
        """Samples used per cell before `step`; another `Schedule` continues from there with it as `used`."""
        return tuple(self._walk_from(step).used)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """The endless sequence of steps from `start` on. Finding the start needs no replay."""
        walk = self._walk_from(start)
        while True:
            yield walk.advance()

    def positions(self, step: Step, rank: int) -> np.ndarray:
        """Positions (int64, one per sample of the batch) that `rank` takes from the step's cell."""
        batch = self.cells[step.cell].batch
        return step.first + rank * batch + np.arange(batch, dtype=np.int64)

    def records(self, cell: int, positions: np.ndarray) -> np.ndarray:
        """Indices (int64, 0 <= i < records) of the cell's records at `positions` of its stream."""
        # Every epoch visits the same random half first and the other half second, each in a new order. Otherwise a
        # batch that crosses the end of an epoch could hold a record twice; now it takes more than half of them.
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
        """The random numbers of one visit (such as which part of a clip), after `attempt` unreadable files."""
        # Not drawn from a running generator, because workers and ranks read positions in any order, and a resumed
        # run must draw what an uninterrupted one would have.
        return np.random.default_rng([int(self._keys[cell]), position, attempt])

    def _walk_from(self, step: int) -> "_Walk":
        """The schedule just before `step`: in closed form to a few steps a cell before it, then step by step."""
        # At global time T every source has done exactly the batches due by then. Their number grows like `rate` *
        # T, within a batch per cell, so the first guess is right if the sources keep pace with each other. If they
        # do not (`used` is from other shares, or files were added since), the guesses are bisected.
        used, done = list(self.base), 0
        rate, slack = sum(s.rate for s in self._sources), len(self.cells) + len(self._sources)
        time = sum(self.base) + (step - slack) / rate
        earliest, latest = min(sum(self.base[i] for i in s.cells) / s.share for s in self._sources), math.inf
        while step - done > 2 * slack:
            guess = list(self.base)
            for source in self._sources:
                source.advance(guess, time)
            count = sum((guess[i] - self.base[i]) // n for s in self._sources for i, n in s.batch.items())
            if count <= step:
                used, done, earliest = guess, count, time
            else:
                latest = time
            time += (step - slack - count) / rate
            if not earliest < time < latest:
                time = (earliest + latest) / 2
        walk = _Walk(self._sources, used)
        for _ in range(step - done):
            walk.advance()
        return walk


class _Source:
    """The cells of one source. A cell's next batch is `due` in source time, and happens at a global `time`."""

    def __init__(self, share: float, name: str, cells: Sequence[Cell], world: int) -> None:
        records = sum(c.records for c in cells if c.source == name)
        self.share = share
        self.cells = [i for i, c in enumerate(cells) if c.source == name]
        self.batch = {i: cells[i].batch * world for i in self.cells}  # samples a step, over all ranks
        self.stretch = {i: records / cells[i].records for i in self.cells}  # source time a sample
        self.rate = share * sum(1 / (self.batch[i] * self.stretch[i]) for i in self.cells)  # batches a global time

    def queue(self, used: Sequence[int]) -> list[tuple[float, int]]:
        """A heap of when the next batch of each cell is due; ties go to the first cell."""
        queue = [(self.due(i, used[i]), i) for i in self.cells]
        heapq.heapify(queue)
        return queue

    def due(self, cell: int, used: int) -> float:
        return (used + self.batch[cell] / 2) * self.stretch[cell]

    def time(self, cell: int, total: int) -> float:
        return (total + self.batch[cell] / 2) / self.share

    def advance(self, used: list[int], time: float) -> None:
        """Advance the source's entries of `used` from the base to its state at global `time`."""
        base, most = [used[i] for i in self.cells], self.share * time
        limit = most - sum(self.batch.values())
        total = self._fill(used, base, limit)
        while total > most:  # only if cells of the base are ahead, so that fewer cells make up the samples
            moving = sum(1 / self.stretch[i] for i, start in zip(self.cells, base) if used[i] > start)
            if not moving:
                break
            limit -= (total - most + sum(self.batch.values())) / moving
            total = self._fill(used, base, limit)
        queue = self.queue(used)
        while self.time(queue[0][1], total) <= time:
            cell = queue[0][1]
            used[cell] += self.batch[cell]
            total += self.batch[cell]
            heapq.heapreplace(queue, (self.due(cell, used[cell]), cell))

    def _fill(self, used: list[int], base: Sequence[int], limit: float) -> int:
        """Set `used` to all batches due at source time `limit`, and return their samples, base included."""
        for i, start in zip(self.cells, base):  # rounding may be off by a batch, which the heap corrects
            done = math.floor((limit / self.stretch[i] - start) / self.batch[i] - 0.5)
            used[i] = start + max(0, done) * self.batch[i]
        return sum(used[i] for i in self.cells)


class _Walk:
    """Walks the schedule: `used` counts samples per cell, and the heaps hold what is due next."""

    def __init__(self, sources: Sequence[_Source], used: list[int]) -> None:
        self.used = used
        self._sources = sources
        self._queues = [s.queue(used) for s in sources]
        self._totals = [sum(used[i] for i in s.cells) for s in sources]
        self._next = [
            (s.time(q[0][1], n), k) for k, (s, q, n) in enumerate(zip(sources, self._queues, self._totals))
        ]
        heapq.heapify(self._next)

    def advance(self) -> Step:
        """Do the next step and return it; ties go to the first source."""
        k = self._next[0][1]
        source, queue = self._sources[k], self._queues[k]
        cell = queue[0][1]
        step = Step(cell, self.used[cell])
        self.used[cell] += source.batch[cell]
        self._totals[k] += source.batch[cell]
        heapq.heapreplace(queue, (source.due(cell, self.used[cell]), cell))
        heapq.heapreplace(self._next, (source.time(queue[0][1], self._totals[k]), k))
        return step


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Map `values` (int64, 0 <= v < size) through pseudo-random permutations of range(size), one key each.

    A Feistel network over the next even power of two, repeated until it lands below `size` (cycle walking, Black
    and Rogaway 2002): constant time and memory for any size, where a shuffled list of 100 million takes both.
    """
    if size <= 1:
        return np.zeros_like(values)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    rounds = [_mix(keys + np.uint64(i)) for i in range(FEISTEL_ROUNDS)]
    out = values.astype(np.uint64)
    outside = np.arange(out.size)
    while outside.size:
        v = out[outside]
        left, right = v >> half_bits, v & mask
        for key in rounds:
            left, right = right, left ^ (_mix(right ^ key[outside]) & mask)
        v = (left << half_bits) | right
        out[outside] = v
        outside = outside[v >= size]
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
