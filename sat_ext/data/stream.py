"""The composer: schedule -> reader -> collate. A step is a pack of groups, or one batch of one bucket."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import default_collate

from sat_ext.data.buckets import StepSize
from sat_ext.data.faults import Faults
from sat_ext.data.guard import Guard
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.schedule import Cell, Part, Schedule
from sat_ext.data.timesteps import stratified_places
from sat_ext.data.visits import MediaReader, read_pixels, sample_capacity
from sat_ext.errors import MediaError
from sat_ext.pixels import to_model_range
from sat_ext.types import Bucket, Sample


class Reader(Protocol):
    """Makes samples of records: from media files (`MediaReader`), or from a cache (`sat_ext.latents.reader`)."""

    def read(self, group: Group, record: int, number: int, rng: np.random.Generator) -> Sample:
        """Visit `number` of a record, counted over the run. Raises `MediaError`: another takes its place."""

    def expect(self, coming: Iterable[tuple[Group, Sequence[int]]]) -> None:
        """These records will be read after those of earlier calls."""


class JointStream:
    """Batches of an index in the order of its schedule, for any rank and data worker, from any step on.

    `size` is how large a rank's steps are. `used` (samples trained on, of each group of the index) continues an
    earlier run; an update has `accumulation` steps. Without a `reader` samples come from their files, read by
    `guard` in a process of their own in each data worker or, without workers, beside the training process.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        size: StepSize,
        world: int,
        dtype: torch.dtype,
        used: Sequence[int] | None = None,
        accumulation: int = 1,
        reader: Reader | None = None,
    ) -> None:
        self.index, self.config, self.dtype = index, config, dtype
        self.size, self.accumulation = size, accumulation
        self.origin = 0  # a step at which an update begins
        cells = cells_of(index, size, world, accumulation)
        self.schedule = Schedule(cells, index.shares, seed=config.seed, world=world, budget=size.budget, used=used)
        budget = config.on_bad_sample
        self._faults = Faults(skip=budget.skip, consecutive=budget.consecutive)
        # room for all samples of the largest group
        capacity = max(size.most(c.bucket) * sample_capacity(c.bucket) for c in cells)
        self.guard = Guard(read_pixels, timeout=budget.timeout, capacity=capacity)
        self.reader = reader or MediaReader(index, config, self.guard)

    def batches(self, *, start: int, rank: int, worker: int = 0, workers: int = 1) -> Iterator[dict[str, Any]]:
        """Endless batches of `rank` from step `start` on; worker w of n makes every n-th, from the w-th."""
        self.reader.expect(self._coming(start + worker, rank))
        for number in count(start + worker, workers):
            self.reader.expect(self._coming(number + workers, rank))
            yield self.batch(number, rank)

    def _coming(self, number: int, rank: int) -> Iterator[tuple[Group, Sequence[int]]]:
        """What `batch` will ask the reader for."""
        parts = self.schedule.step(number)
        for i in chain.from_iterable(self._by_bucket(parts)):
            records = self.schedule.records(parts[i].cell, self.schedule.positions(parts[i], rank))
            yield self.index.groups[parts[i].cell], records.tolist()

    def _by_bucket(self, parts: Sequence[Part]) -> list[list[int]]:
        """Which parts make a group: the cells of several sources with one bucket make one."""
        found: dict[Bucket, list[int]] = {}
        for i, part in enumerate(parts):
            found.setdefault(self.schedule.cells[part.cell].bucket, []).append(i)
        return list(found.values())

    def batch(self, number: int, rank: int) -> dict[str, Any]:
        """The batch of one step: a pack's `groups`, or where steps have one bucket its only group.

        A group has what `collate` makes, and for each sample `loss_weight` and `timestep` (B,), float32. Its mean
        loss is to be multiplied by the weight and added to the step's: so a sample counts 1 over the mean number
        of a step's samples, whatever its bucket. `timestep` is a place in the range, from 0 to 1. Where a source
        has another target than its data, `target` is a list of "data" or "base".

        Raises `DataError` when too many files cannot be read.
        """
        groups = []
        parts = self.schedule.step(number)
        places = stratified_places(self.schedule, number, rank, accumulation=self.accumulation, origin=self.origin)
        for own in self._by_bucket(parts):
            group = self._group([(parts[i].cell, self.schedule.positions(parts[i], rank)) for i in own])
            samples = len(group["txt"])
            group["loss_weight"] = torch.full((samples,), samples / self.schedule.mean_samples)
            if self.index.by_base:
                group["target"] = ["base" if s in self.index.by_base else "data" for s in group["source"]]
            group["timestep"] = torch.from_numpy(np.concatenate([places[i] for i in own])).float()
            groups.append(group)
        return groups[0] if self.size.budget is None else {"groups": groups}

    def mixed_updates(self) -> float:
        """The part of the updates that hold every source, of the first thousand."""
        steps, sources = self.schedule.steps(), {c.source for c in self.schedule.cells}
        updates = [islice(steps, self.accumulation) for _ in range(1000)]
        held = [{self.schedule.cells[p.cell].source for step in update for p in step} for update in updates]
        return sum(found == sources for found in held) / len(held)

    def skipped(self) -> list[tuple[str, str]]:
        """Path and reason of every file that this rank could not read so far."""
        return list(self._faults.found().values())

    def summary(self) -> str:
        """What a rank's steps hold."""
        cells, mean = self.schedule.cells, self.schedule.mean_samples
        if self.size.budget is None:
            return "samples per rank and step: " + ", ".join(f"{c.source} {c.bucket}: {c.batch}" for c in cells)
        return f"packs of up to {self.size.budget} tokens per rank and step, {mean:.3g} samples on average"

    def collated(self, cell: int, positions: np.ndarray) -> dict[str, Any]:
        """The samples at `positions` of a cell's stream as a group, as `collate` makes it. Raises as `batch`."""
        return self._group([(cell, positions)])

    def _group(self, parts: Sequence[tuple[int, np.ndarray]]) -> dict[str, Any]:
        self.guard.release()  # the samples of the last group were copied into it
        return collate([self.sample(cell, int(p)) for cell, positions in parts for p in positions], self.dtype)

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


def cells_of(index: Index, size: StepSize, world: int, accumulation: int) -> list[Cell]:
    """The cells of the index's groups, in their order."""
    batches = [1] * len(index.groups)
    if size.budget is None:  # fewer where there are few records, so that no step holds a record twice
        batches = [max(1, min(size.batches[g.bucket], len(g.rows) // (2 * world))) for g in index.groups]
        records = [(g.source, len(g.rows)) for g in index.groups]
        batches = mixed_batches(records, batches, index.shares, accumulation)
    return [
        Cell(source=g.source, bucket=g.bucket, records=len(g.rows), tokens=size.tokens[g.bucket], batch=batch)
        for g, batch in zip(index.groups, batches)
    ]


def mixed_batches(
    cells: Sequence[tuple[str, int]], batches: Sequence[int], shares: Mapping[str, float], accumulation: int
) -> list[int]:
    """`batches` of steps of one bucket, reduced until each source has one in `accumulation` steps of an update.

    `cells` are sources and records. Where shares are too far apart for that, batches end at 1.

    >>> mixed_batches([("stills", 100), ("clips", 100)], [11, 1], {"stills": 1, "clips": 1}, accumulation=4)
    [3, 1]
    """
    found, records = list(batches), Counter[str]()
    if accumulation == 1:
        return found
    for source, n in cells:
        records[source] += n
    while True:
        steps = dict.fromkeys(records, 0.0)  # of each source, in proportion
        for (source, n), batch in zip(cells, found, strict=True):
            steps[source] += shares[source] * n / records[source] / batch
        least = sum(steps.values()) / accumulation
        rare = [i for i, (source, _) in enumerate(cells) if steps[source] < least * (1 - 1e-9) and found[i] > 1]
        if not rare:
            return found
        found[min(rare, key=lambda i: (steps[cells[i][0]], -found[i]))] -= 1


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
