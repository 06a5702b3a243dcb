"""The composer: schedule -> reader -> collate. One batch a step, of one bucket."""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import default_collate

from sat_ext.data.faults import Faults
from sat_ext.data.guard import Guard
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.schedule import Cell, Schedule, Step
from sat_ext.data.visits import MediaReader, read_pixels, sample_capacity
from sat_ext.errors import MediaError
from sat_ext.pixels import to_model_range
from sat_ext.types import Bucket, Sample


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
        cells = []
        for group in index.groups:
            records = len(group.rows)
            # smaller batches where there are few records, so that no step holds a record twice
            batch = max(1, min(batch_sizes[group.bucket], records // (2 * world)))
            cells.append(Cell(source=group.source, bucket=group.bucket, records=records, batch=batch))
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
            if attempt:  # drawn, so that no neighbour of a bad file is always seen twice
                record = int(rng.integers(len(group.rows)))
            row = int(group.rows[record])
            if row in self._faults:  # found by whichever worker, so that each file costs its time-out once
                self._faults.require_another(group.rows, group.source, group.bucket)
                continue
            try:
                sample = self.reader.read(group, record, position // len(group.rows), rng)
                self._faults.clear_run()
                return sample
            except MediaError as error:
                self._faults.add(row, error)
        raise AssertionError("the budget of faults ends the loop")


def collate(samples: Sequence[Sample], dtype: torch.dtype) -> dict[str, Any]:
    """The batch of B samples, all of one shape.

    `mp4` is (B, T, C, H, W), in [-1, 1] and `dtype`, or as decoded where that is uint8. Latents stay as they are,
    (B, t, C, h, w), and those of an image-to-video model bring `condition_latents` (B, 1, C, h, w). `num_frames`
    and `fps` are int64 (B,), the others lists of B strings.
    """
    assert samples, "a batch of no samples"
    shapes = {tuple(s.pixels.shape) for s in samples}
    assert len(shapes) == 1, f"samples of several shapes in one batch: {sorted(shapes)}"
    clips = [s.pixels for s in samples]
    # PyTorch's collation allocates in the memory that a data worker shares with the trainer; `to_model_range` does
    # not, and its result is copied there once more.
    is_final = dtype == torch.uint8 or clips[0].dtype != torch.uint8
    conditions = [s.condition for s in samples if s.condition is not None]
    return {
        "mp4": default_collate(clips) if is_final else to_model_range(torch.stack(clips), dtype),
        **({"condition_latents": default_collate(conditions)} if conditions else {}),
        "txt": [s.caption for s in samples],
        "num_frames": torch.tensor([s.num_frames for s in samples], dtype=torch.int64),
        "fps": torch.tensor([s.fps for s in samples], dtype=torch.int64),
        "kind": [s.kind for s in samples],
        "source": [s.source for s in samples],
        "key": [s.key for s in samples],
    }
