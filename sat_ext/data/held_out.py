"""The samples of an evaluation: a fixed list with every kind of every source, whatever the number of ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from sat_ext.data.stream import JointStream


@dataclass(frozen=True, slots=True)
class HeldOutStep:
    """`size` samples on each rank, from position `first` of the cell on; of all together, `counted` count.

    All ranks run the network equally often: under ZeRO-3 a rank that ran it once less would leave the others
    waiting. So where the last samples of a cell are fewer than the ranks, the other ranks repeat the first of
    them, and their batch says that it does not count.
    """

    cell: int
    first: int
    size: int
    counted: int

    def positions(self, rank: int) -> np.ndarray:
        """Positions (int64) in the cell of the samples that `rank` runs."""
        return self.first + self.size * rank * self.counts(rank) + np.arange(self.size, dtype=np.int64)

    def counts(self, rank: int) -> bool:
        """Whether the rank's samples count, or repeat others."""
        return self.size * rank < self.counted


class HeldOut:
    """Batches of an evaluation of `samples` samples, over `world` ranks, again and again.

    In place of `loss_weight` a batch has `counted`: how many of its samples count (all or none).
    """

    def __init__(self, stream: JointStream, *, samples: int, world: int) -> None:
        assert stream.schedule.world == 1  # or the list would depend on the number of ranks
        self.stream = stream
        self.counts = _of_each_cell(stream, samples)
        cells = zip(stream.schedule.cells, self.counts)
        self.steps = [s for i, (cell, n) in enumerate(cells) for s in steps_of(i, n, cell.batch, world)]

    def batches(self, *, rank: int, worker: int = 0, workers: int = 1) -> Iterator[dict[str, Any]]:
        """The batches of `rank`, endlessly; worker w of n makes every n-th, from the w-th."""
        for number in count(worker, workers):
            step = self.steps[number % len(self.steps)]
            batch = self.stream.collated(step.cell, step.positions(rank))
            yield {**batch, "counted": step.size * step.counts(rank)}

    def summary(self) -> str:
        """How many samples of which bucket."""
        cells = zip(self.stream.schedule.cells, self.counts)
        return ", ".join(f"{cell.source} {cell.bucket}: {n}" for cell, n in cells if n)


def _of_each_cell(stream: JointStream, samples: int) -> list[int]:
    """How many samples are taken of each cell: first shared over kinds and sources, then over their buckets."""
    cells = stream.schedule.cells
    groups: dict[tuple[str, bool], list[int]] = {}
    for i, cell in enumerate(cells):
        groups.setdefault((cell.source, cell.bucket.frames == 1), []).append(i)
    taken = [0] * len(cells)
    totals = share_out([sum(cells[i].records for i in g) for g in groups.values()], samples, least=1)
    for group, total in zip(groups.values(), totals):
        for i, n in zip(group, share_out([cells[i].records for i in group], total, least=0)):
            taken[i] = n
    return taken


def share_out(records: Sequence[int], total: int, *, least: int) -> list[int]:
    """`total` samples over groups of so many records, in proportion; at least `least`, at most all of each.

    >>> share_out([80, 20], 8, least=1), share_out([80, 1], 8, least=1)
    ([6, 2], [7, 1])
    """
    taken = [min(least, n) for n in records]
    while sum(taken) < min(total, sum(records)):
        # Sainte-Laguë's method, which favours neither the large nor the small
        claims = [n / (2 * t + 1) if n > t else 0 for n, t in zip(records, taken)]
        taken[claims.index(max(claims))] += 1
    return taken


def steps_of(cell: int, samples: int, batch: int, world: int) -> Iterator[HeldOutStep]:
    """The steps that take the first `samples` positions of a cell, up to `batch` on each rank.

    >>> [(s.size, s.counted) for s in steps_of(0, 11, batch=4, world=2)]
    [(4, 8), (1, 2), (1, 1)]
    """
    first = 0
    while first < samples:
        size = max(1, min(batch, (samples - first) // world))
        counted = min(samples - first, size * world)
        yield HeldOutStep(cell, first, size, counted)
        first += counted
