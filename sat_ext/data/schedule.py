"""What each step trains on: a pure function of (cells, shares, seed, world, step).

A *cell* is the records of one source that fall into one bucket. A *draw* is one sample of a cell for every rank,
and a step is a *pack* of draws from several cells, the same on all ranks; or, for an engine that takes one shape a
step, a single draw of a whole batch. Positions count samples: a cell's stream is a chain of permutations of its
records, of which the first `used` positions have been trained on. So the state is one integer per cell, for any
number of ranks.

Draws come in windows of a fixed number. How many of a window's draws are of which cell follows from the number of
draws before it (`Apportion`): so any step is found without replaying those before it, shares are exact, and the
cells of a source reach the end of an epoch together.

All windows have the same packs, laid out once (`pack`) as slots of a size in tokens, into which each window puts
its own draws, spread evenly. Windows differ by a draw or two of each size, so there are as many slots of a size or
a larger one as any window may need, and what a window does not need of them is filled with smaller draws. If
windows have 3 or 4 clips and 7 or 6 stills, the layout has 4 slots for clips and 6 for stills, and a window of 3
clips puts its seventh still into a slot for a clip.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sat_ext.data.apportion import Apportion
from sat_ext.data.packing import pack
from sat_ext.data.permutation import key_of, mix, permute
from sat_ext.types import Bucket

WINDOW = 1024  # draws at least: roundings are a hundredth of it, and it is laid out in some 20 ms
PACKS = 64  # in a window at least: the last may be a remainder


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The `records` (visits an epoch) of one source in one bucket.

    A sample has `tokens`; a draw has `batch` samples for each rank, 1 where packs hold several cells.
    """

    source: str
    bucket: Bucket
    records: int
    tokens: int
    batch: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """What a step takes of one cell: the position of its first sample, and the number of samples for each rank."""

    cell: int
    first: int
    samples: int


@dataclass(frozen=True, slots=True)
class _Window:
    """`before` are each cell's draws until it begins; for each of its slots, `cells` is the cell, and `numbers`
    which of the cell's draws in this window."""

    before: np.ndarray
    cells: np.ndarray
    numbers: np.ndarray


class Schedule:
    """The steps of a run, each a tuple of `Part`, one for each cell in it.

    With a `budget` a step is a pack of at most so many tokens for each rank; without, one draw. `used` (samples
    per cell, from `state`) continues an earlier run on any `world`.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        shares: Mapping[str, float],
        *,
        seed: int,
        world: int,
        budget: int | None = None,
        used: Sequence[int] | None = None,
    ) -> None:
        assert cells and world > 0 and all(c.records > 0 and c.batch > 0 for c in cells)
        assert budget is None or all(c.batch == 1 for c in cells)
        self.cells = tuple(cells)
        self.seed, self.world, self.shares, self.budget = seed, world, dict(shares), budget
        self.used = np.array(used if used is not None else [0] * len(cells), dtype=np.int64)
        assert self.used.shape == (len(cells),)
        assert shares.keys() == {c.source for c in cells} and min(shares.values()) > 0, shares
        records = Counter[str]()
        for c in cells:
            records[c.source] += c.records
        draws = [shares[c.source] * c.records / records[c.source] / c.batch for c in cells]
        self._draw = np.array([c.batch * world for c in cells])  # samples
        share = np.array(draws) / sum(draws)
        self.window = WINDOW
        if budget is not None:  # as many whole packs as fill it
            samples = budget / float(share @ [c.tokens for c in cells])  # of a full pack
            self.window = math.floor(max(PACKS, math.ceil(WINDOW / samples)) * samples)
        self._apportion = Apportion(
            draws,
            [(c.source, c.tokens) for c in cells],
            window=self.window,
            used=(self.used / self._draw).tolist(),
        )
        self._keys = [key_of(seed, c.source, str(c.bucket)) for c in cells]
        self._cell_size = np.array([c.tokens if budget else 1 for c in cells])
        by_size: dict[int, dict[str, list[int]]] = {}
        for i, (c, size) in enumerate(zip(cells, self._cell_size.tolist(), strict=True)):
            by_size.setdefault(size, {}).setdefault(c.source, []).append(i)
        self._sizes = sorted(by_size, reverse=True)
        self._cells_of_size = [list(by_size[size].values()) for size in self._sizes]  # of each source apart
        self._slots, packs = self._lay_out(share, budget or 1)
        self._starts = np.concatenate([[0], np.cumsum(packs)])  # the first slot of each pack
        batch = np.array([c.batch for c in cells])
        # samples a rank and step, on average: the loss of a step is the sum over its samples divided by this
        self.mean_samples = self.window / len(packs) * float(batch @ draws) / sum(draws)
        self._window = lru_cache(2)(self._make_window)

    def _lay_out(self, share: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """The size of each slot of a window, (window,), and the slots of each pack."""
        most = []  # draws that a window may have of this size or a larger one
        for size in self._sizes[:-1]:
            large = self._cell_size >= size
            slack = self._apportion.slack(large.tolist())
            most.append(math.floor(self.window * share[large].sum() + slack + 1e-6))
        most.append(self.window)
        # the slack of some cells can be more than that of all: they are not more draws for that
        most = np.minimum.accumulate(most[::-1])[::-1].tolist()
        packs = pack(np.diff([0, *most]).tolist(), self._sizes, budget, self._limits(share))
        return np.concatenate([np.repeat(np.arange(len(self._sizes)), p) for p in packs]), packs.sum(1)

    def _limits(self, share: np.ndarray) -> list[int]:
        """How many draws of each size a pack may have, so that it holds no record twice.

        Up to half of a cell's records can be taken at once, less one for a slot of a larger size. A size's draws
        are spread over its cells by their shares.
        """
        most = np.array([max(1, c.records // (2 * self.world) - 1) for c in self.cells])
        limits = []
        for size in self._sizes:
            own = self._cell_size == size
            limits.append(max(1, int((most[own] / (share[own] / share[own].sum())).min())))
        return limits

    def begun_at(self, used: Sequence[int]) -> "Schedule":
        """The schedule of the same cells that began with `used`."""
        return Schedule(self.cells, self.shares, seed=self.seed, world=self.world, budget=self.budget, used=used)

    def steps(self, start: int = 0) -> Iterator[tuple[Part, ...]]:
        """The endless sequence of steps from `start` on. Finding the start needs no replay."""
        number = start
        while True:
            yield self.step(number)
            number += 1

    def step(self, number: int) -> tuple[Part, ...]:
        """One step."""
        window, slots = self._find(number)
        cells, numbers = window.cells[slots], window.numbers[slots]
        parts = []
        for cell in np.unique(cells).tolist():
            draws = numbers[cells == cell]
            first = self.used[cell] + (window.before[cell] + draws[0]) * self._draw[cell]
            parts.append(Part(cell, int(first), len(draws) * self.cells[cell].batch))
        return tuple(parts)

    def state(self, step: int) -> tuple[int, ...]:
        """Samples used per cell before `step`; another `Schedule` continues from there with it as `used`."""
        window, slots = self._find(step)
        done = np.bincount(window.cells[: slots.start], minlength=len(self.cells))
        return tuple((self.used + (window.before + done) * self._draw).tolist())

    def positions(self, part: Part, rank: int) -> np.ndarray:
        """Positions (int64, one per sample) that `rank` takes from the part's cell."""
        return part.first + rank * part.samples + np.arange(part.samples, dtype=np.int64)

    def records(self, cell: int, positions: np.ndarray) -> np.ndarray:
        """Indices (int64, 0 <= i < records) of the cell's records at `positions` of its stream.

        Every epoch visits the same random half first and the other half second, each in a new order. Otherwise a
        step that crosses the end of an epoch could hold a record twice; now it takes more than half of the
        records.
        """
        n, key = self.cells[cell].records, self._keys[cell]
        epoch, place = np.divmod(np.asarray(positions, dtype=np.int64), n)
        half = n // 2
        out = np.empty_like(place)
        for second, low, size in ((False, 0, half), (True, half, n - half)):
            chosen = (place >= half) == second
            if chosen.any():
                keys = mix(epoch[chosen].astype(np.uint64) * np.uint64(2) + np.uint64(second + 1)) ^ key
                out[chosen] = low + permute(place[chosen] - low, size, keys)
        return permute(out, n, np.full(out.shape, key))

    def rng(self, cell: int, position: int, attempt: int = 0) -> np.random.Generator:
        """The random numbers of one visit (such as which part of a clip), after `attempt` unreadable files.

        Seeded by the cell and the position and not drawn from a running generator, because workers and ranks read
        positions in any order, and a resumed run must draw what an uninterrupted one would have.
        """
        return np.random.default_rng([int(self._keys[cell]), position, attempt])

    def _find(self, step: int) -> tuple[_Window, slice]:
        number, place = divmod(step, len(self._starts) - 1)
        return self._window(number), slice(int(self._starts[place]), int(self._starts[place + 1]))

    def _make_window(self, number: int) -> _Window:
        before = np.array(self._apportion.counts(number * self.window))
        draws = np.array(self._apportion.counts((number + 1) * self.window)) - before
        cells = np.empty(self.window, dtype=np.int64)
        free = np.zeros(self.window, dtype=bool)
        for i, sources in enumerate(self._cells_of_size):
            free |= self._slots == i
            due = _merge([_merge([np.full(draws[c], c) for c in own]) for own in sources])
            slots = np.flatnonzero(free)
            taken = slots[np.arange(len(due)) * len(slots) // max(1, len(due))]  # what stays free is spread evenly
            cells[taken] = due
            free[taken] = False
        numbers = np.empty(self.window, dtype=np.int64)
        order = np.argsort(cells, kind="stable")
        numbers[order] = np.concatenate([np.arange(n) for n in draws])
        return _Window(before, cells, numbers)


def _merge(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Sequences as one, each spread evenly over it."""
    due = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
    return np.concatenate(parts)[np.argsort(due, kind="stable")]
