"""The composer: schedule -> clip -> decode -> transform -> collate. One batch a step, of one bucket."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sat_ext.data.clips import sample_times
from sat_ext.data.collate import collate
from sat_ext.data.config import BadSampleConfig, DataConfig
from sat_ext.data.decode import read_frames, read_still
from sat_ext.data.index import Index
from sat_ext.data.schedule import Cell, Schedule, Step
from sat_ext.data.transform import to_bucket
from sat_ext.errors import DataError, MediaError
from sat_ext.types import IMAGE_EXTENSIONS, Bucket, Sample

log = logging.getLogger(__name__)


class Faults:
    """Counts the files that could not be read during a run, and ends the run past the budget."""

    def __init__(self, budget: BadSampleConfig) -> None:
        self.budget = budget
        self.bad: dict[int, tuple[str, str]] = {}  # by row: path and reason, not the error, which holds frames
        self._in_a_row = 0

    def add(self, row: int, error: MediaError) -> None:
        """Note one bad file. Raises `DataError` with the list of files when the budget is spent."""
        if row not in self.bad:
            log.warning("skipped: %s", error)
        self.bad[row] = error.path, error.reason
        self._in_a_row += 1
        if len(self.bad) > self.budget.skip or self._in_a_row > self.budget.consecutive:
            listed = "; ".join(f"{path}: {reason}" for path, reason in list(self.bad.values())[-20:])
            raise DataError(
                f"{len(self.bad)} files could not be read, {self._in_a_row} in a row, more than "
                f"data.params.on_bad_sample allows (skip {self.budget.skip}, "
                f"consecutive {self.budget.consecutive}); mend or remove them: {listed}"
            ) from None

    def require_another(self, rows: np.ndarray, source: str, bucket: Bucket) -> None:
        """Raise `DataError` when not one of the rows is left to stand in for a bad one."""
        if all(int(row) in self.bad for row in rows):
            path, reason = self.bad[int(rows[0])]
            raise DataError(
                f"source '{source}': no file of bucket {bucket} can be read, {path} for one ({reason}); mend "
                "or remove them."
            )

    def clear_run(self) -> None:
        """A file was read: the next bad one starts a new row of failures."""
        self._in_a_row = 0


class JointStream:
    """Batches of an index in the order of its schedule. One object serves any rank, worker and start.

    `batch_sizes` gives samples per rank by bucket. Where a bucket of a source has few records, its batch is
    smaller, so that no step holds a record twice.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        batch_sizes: dict[Bucket, int],
        world: int,
        dtype: torch.dtype,
    ) -> None:
        self.index, self.config, self.dtype = index, config, dtype
        cells = [
            Cell(
                source=g.source,
                bucket=g.bucket,
                records=len(g.rows),
                batch=max(1, min(batch_sizes[g.bucket], len(g.rows) // (2 * world))),
            )
            for g in index.groups
        ]
        for cell in cells:
            if cell.records < 2 * world:
                log.warning(
                    "source '%s' has %d records in bucket %s for %d ranks: a step can hold one of them twice",
                    cell.source, cell.records, cell.bucket, world,
                )  # fmt: skip
        self.schedule = Schedule(cells, index.shares, seed=config.seed, world=world)
        self._faults = Faults(config.on_bad_sample)

    def batches(
        self, *, start: int, rank: int, worker: int = 0, workers: int = 1, cycle: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Endless batches of `rank` from step `start` on; worker w of n makes every n-th, from the w-th.

        With `cycle`, the steps after `start + cycle` are those from `start` again: every evaluation of so many
        steps then sees the same samples.
        """
        if cycle is not None:
            steps = list(islice(self.schedule.steps(start), cycle))
            number = worker
            while True:
                yield self.batch(steps[number % cycle], rank)
                number += workers
        for step in islice(self.schedule.steps(start), worker, None, workers):
            yield self.batch(step, rank)

    def batch(self, step: Step, rank: int) -> dict[str, Any]:
        """The batch of one step. Raises `DataError` when too many files cannot be read."""
        return collate(
            [self.sample(step.cell, int(p)) for p in self.schedule.positions(step, rank)],
            self.dtype,
        )

    def sample(self, cell: int, position: int) -> Sample:
        """The sample at `position` of a cell's stream; a bad file gives way to another of the same cell."""
        group = self.index.groups[cell]
        row = int(group.rows[self.schedule.records(cell, np.array([position]))[0]])
        for attempt in count():
            rng = self.schedule.rng(cell, position, attempt)
            if attempt:
                row = int(group.rows[rng.integers(len(group.rows))])
            if row in self._faults.bad:
                self._faults.require_another(group.rows, group.source, group.bucket)
                continue
            try:
                sample = self._load(row, group.source, group.bucket, rng)
                self._faults.clear_run()
                return sample
            except MediaError as error:
                self._faults.add(row, error)
        raise AssertionError("the budget of faults ends the loop")

    def _load(self, row: int, source: str, bucket: Bucket, rng: np.random.Generator) -> Sample:
        item, info = self.index.item(row)
        if info.frames == 1 and Path(item.path).suffix.lower() in IMAGE_EXTENSIONS:
            frames, num_frames, fps = read_still(item.path), 1, self.config.fps
        else:
            clip = sample_times(
                self.index.samplers[source],
                info=info,
                frames=bucket.frames,
                fps=self.config.fps,
                rng=rng,
                short=self.config.short_clips,
                skip_frames=self.config.skip_frms_num,
            )
            frames = read_frames(item.path, clip.times, decoder=self.config.decoder)
            num_frames, fps = clip.num_frames, clip.fps
        return Sample(
            pixels=to_bucket(frames, bucket.height, bucket.width),
            caption=item.caption,
            num_frames=num_frames,
            fps=fps,
            kind="image" if bucket.frames == 1 else "video",
            source=source,
            key=item.key,
        )
