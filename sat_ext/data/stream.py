"""The composer: schedule -> clip -> decode -> transform -> collate. One batch a step, of one bucket."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from math import prod
from typing import Any

import numpy as np
import torch

from sat_ext.data.collate import collate
from sat_ext.data.decode import read_frames, read_still
from sat_ext.data.faults import Faults
from sat_ext.data.guard import Guard
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.schedule import Cell, Schedule, Step
from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError
from sat_ext.files import require_unchanged
from sat_ext.latents.reader import Cached, show
from sat_ext.types import Bucket, Item, Sample

log = logging.getLogger(__name__)

_LISTED = 5  # cells of a warning
_SLACK = 64  # bytes between the samples of a batch in shared memory


def read_pixels(
    path: str, times: Sequence[float] | None, decoder: str, fit: Fit, seen: tuple[str, float]
) -> np.ndarray:
    """The pixels of one sample, uint8 (T, 3, height, width): the frames at `times`, or a still where that is None.

    Runs in the guard's process. Raises `MediaError`, also for a file that is another one than was `seen`.
    """
    require_unchanged(path, *seen)
    pixels = read_still(path, fit=fit) if times is None else read_frames(path, times, decoder=decoder, fit=fit)
    return pixels.numpy()


class JointStream:
    """Batches of an index in the order of its schedule. One object serves any rank, worker and start.

    `batch_sizes` gives samples per rank by bucket. Where a bucket of a source has few records, its batch is
    smaller, so that no step holds a record twice. `used` (samples of each group of the index that were trained on)
    goes on with an earlier run. With `cached`, no media are read. Files are read in a process of the stream's own
    (see `guard`), in each data worker or, without workers, beside the training process.
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
        cached: Cached | None = None,
    ) -> None:
        self.index, self.config, self.dtype, self.cached = index, config, dtype, cached
        cells = [
            Cell(
                source=g.source,
                bucket=g.bucket,
                records=len(g.rows),
                batch=max(1, min(batch_sizes[g.bucket], len(g.rows) // (2 * world))),
            )
            for g in index.groups
        ]
        few = [f"'{c.source}' {c.bucket}: {c.records}" for c in cells if c.records < 2 * world and world > 1]
        if few:
            shown = ", ".join(few[:_LISTED]) + ", ..." * (len(few) > _LISTED)
            log.warning(
                "%d pairs of source and bucket have fewer than 2 records for each of the %d ranks, so that a step "
                "can hold one twice (%s)", len(few), world, shown,
            )  # fmt: skip
        self.schedule = Schedule(cells, index.shares, seed=config.seed, world=world, used=used)
        budget = config.on_bad_sample
        self._faults = Faults(
            skip=budget.skip, consecutive=budget.consecutive, rows=sum(c.records for c in self.schedule.cells)
        )
        # room for all samples of the largest batch
        capacity = max(
            c.batch * (_SLACK + 3 * prod((c.bucket.frames, c.bucket.height, c.bucket.width))) for c in cells
        )
        self._read = Guard(read_pixels, timeout=budget.timeout, capacity=capacity)

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
        self._read.release()  # the samples of the last batch were copied into it
        samples = [self.sample(cell, int(p)) for p in positions]
        batch = collate(samples, torch.uint8 if self.cached else self.dtype)
        if self.cached is not None and self.cached.as_pixels:
            batch["mp4"] = batch.pop("latents").to(self.dtype)
        return batch

    def sample(self, cell: int, position: int) -> Sample:
        """The sample at `position` of a cell's stream; a bad file gives way to another of the same cell.

        Its pixels hold until the next `batch`.
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
                visit = position // len(group.rows)
                sample = self._load(group, record, rng, visit)
                self._faults.clear_run()
                return sample
            except MediaError as error:
                self._faults.add(row, error)
        raise AssertionError("the budget of faults ends the loop")

    def _load(self, group: Group, record: int, rng: np.random.Generator, visit: int) -> Sample:
        if self.cached is not None:
            return self._take(self.cached, group, record, rng, visit)
        shown = show(self.index, self.config, group, record, rng)
        caption = _draw_caption(shown.item, rng)
        fit = Fit(group.bucket.height, group.bucket.width, shown.item.crop)
        pixels = self._read(shown.item.path, shown.times, self.config.decoder, fit, shown.seen)
        return shown.sample(torch.from_numpy(pixels), caption)

    def _take(self, cached: Cached, group: Group, record: int, rng: np.random.Generator, visit: int) -> Sample:
        """From the cache, with the caption that `_load` has too where its sampler does not draw."""
        shown, entry = cached.find(self.index, self.config, group, record, visit)
        caption = _draw_caption(shown.item, rng)
        pixels = torch.zeros(group.bucket.frames, 3, 1, 1, dtype=torch.uint8)
        return replace(shown.sample(pixels, caption), encoded=cached.read(entry, visit, rng))


def _draw_caption(item: Item, rng: np.random.Generator) -> str:
    """One of the item's captions. A single one is not drawn for, so that it changes no other random number."""
    if len(item.captions) == 1:
        return item.captions[0]
    weights = np.array(item.caption_weights or (1.0,) * len(item.captions))
    return item.captions[int(rng.choice(len(weights), p=weights / weights.sum()))]
