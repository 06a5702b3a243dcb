"""The composer: schedule -> reader -> collate. One batch a step, of one bucket."""

import logging
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch

from sat_ext.data.collate import collate
from sat_ext.data.faults import Faults
from sat_ext.data.guard import Guard
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.schedule import Cell, Schedule, Step
from sat_ext.data.sources.texts import listed
from sat_ext.data.visits import MediaReader, read_pixels, sample_capacity
from sat_ext.errors import MediaError
from sat_ext.types import Bucket, Sample

log = logging.getLogger(__name__)


class Reader(Protocol):
    """Makes samples of records: from media files (`MediaReader`), or from a cache (`sat_ext.latents.reader`)."""

    def read(self, group: Group, record: int, number: int, rng: np.random.Generator) -> Sample:
        """Visit `number` of a record, counted over the run. Raises `MediaError`: another takes its place."""


class JointStream:
    """Batches of an index in the order of its schedule, for any rank and data worker, from any step on.

    `batch_sizes` gives samples per rank by bucket. `used` (samples trained on, of each group of the index)
    continues an earlier run. Without a `reader` samples come from their files, read by `guard` in a process of
    their own in each data worker or, without workers, beside the training process.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        batch_sizes: dict[Bucket, int],
        world: int,
        dtype: torch.dtype,
        used: Sequence[int] | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.index, self.config, self.dtype = index, config, dtype
        # smaller batches where a bucket of a source has few records, so that no step holds a record twice
        batches = [max(1, min(batch_sizes[g.bucket], len(g.rows) // (2 * world))) for g in index.groups]
        cells = [
            Cell(source=g.source, bucket=g.bucket, records=len(g.rows), batch=batch)
            for g, batch in zip(index.groups, batches)
        ]
        few = [f"{c.source} {c.bucket}: {c.records}" for c in cells if c.records < 2 * world and world > 1]
        if few:
            log.warning(
                "%d pairs of source and bucket have fewer than 2 records for each of the %d ranks, so that a step "
                "can hold one twice (%s)",
                len(few), world, listed(few),
            )  # fmt: skip
        self.schedule = Schedule(cells, index.shares, seed=config.seed, world=world, used=used)
        budget = config.on_bad_sample
        self._faults = Faults(skip=budget.skip, consecutive=budget.consecutive)
        # room for all samples of the largest batch
        capacity = max(c.batch * sample_capacity(c.bucket) for c in cells)
        self.guard = Guard(read_pixels, timeout=budget.timeout, capacity=capacity)
        self.reader = reader or MediaReader(index, config, self.guard)

    def batches(self, *, start: int, rank: int, worker: int = 0, workers: int = 1) -> Iterator[dict[str, Any]]:
        """Endless batches of `rank` from step `start` on; worker w of n makes every n-th, from the w-th."""
        for step in islice(self.schedule.steps(start), worker, None, workers):
            yield self.batch(step, rank)

    def batch(self, step: Step, rank: int) -> dict[str, Any]:
        """The batch of one step. Raises `DataError` when too many files cannot be read."""
        batch = self.collated(step.cell, self.schedule.positions(step, rank))
        batch["loss_weight"] = torch.full((len(batch["txt"]),), self.schedule.loss_weight(step.cell))
        return batch

    def collated(self, cell: int, positions: np.ndarray) -> dict[str, Any]:
        """The samples at `positions` of a cell's stream as a batch, without `loss_weight`. Raises as `batch`."""
        self.guard.release()  # the samples of the last batch were copied into it
        return collate([self.sample(cell, int(p)) for p in positions], self.dtype)

    def sample(self, cell: int, position: int) -> Sample:
        """The sample at `position` of a cell's stream; a bad file is replaced by another of the same cell.

        Its pixels are overwritten by the next `batch`; copy to keep.
        """
        group = self.index.groups[cell]
        record = int(self.schedule.records(cell, np.array([position]))[0])
        for attempt in count():
            rng = self.schedule.rng(cell, position, attempt)
            if attempt:
                record = int(rng.integers(len(group.rows)))
            row = int(group.rows[record])
            if row in self._faults:
                self._faults.require_another(group.rows, group.source, group.bucket)
                continue
            try:
                sample = self.reader.read(group, record, position // len(group.rows), rng)
                self._faults.clear_run()
                return sample
            except MediaError as error:
                self._faults.add(row, error)
        raise AssertionError("the budget of faults ends the loop")
