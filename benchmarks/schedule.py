"""The schedule at full size: its memory and start-up, its promises on 1 to 1,024 ranks, and what steps cost.

    python benchmarks/schedule.py [--records 100000000] [--seed 0] [--json schedule.json]

The index is simulated (no files): half of the records are windows of clips, half are stills, in the buckets of
CogVideoX-5B at 480x720 and alike, mixed half and half. Every figure comes from running the schedule that training
runs; one thread, half a minute, 1 GB. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from report import report

from sat_ext.cogvideox import SequenceShape, tokens
from sat_ext.data.buckets import BucketConfig, batch_sizes, make_buckets, step_cost
from sat_ext.data.index import Group
from sat_ext.data.schedule import Cell, Schedule

WORLDS = (1, 8, 64, 1024)
SHARES = {"clips": 0.5, "stills": 0.5}
SHAPE = SequenceShape()  # CogVideoX-5B
BUCKETS = make_buckets(
    BucketConfig(frames=(1, 17, 33, 49), sizes=((480, 720), (720, 480), (576, 576))), None, None
)
SIZES = batch_sizes(BUCKETS, largest=1, shape=SHAPE)
# Of 256 records of a source: how many fall into each bucket. A made-up data set, uneven as real ones are.
PARTS = {"clips": (0, 0, 0, 40, 20, 10, 50, 20, 6, 80, 20, 10), "stills": (128, 76, 52, 0, 0, 0, 0, 0, 0, 0, 0, 0)}
WINDOWS = 2  # of every clip, as `all_windows` makes them
SMALL = LEAST = 200_000  # records that are followed one by one through an epoch
STEPS_OF_EVERY_RANK = 50

Figures = dict[str, float]


def main() -> int:
    """Run everything, show it, and say by the exit code whether every goal was met."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="save the table here too")
    args = parser.parse_args()
    if args.records < LEAST:
        parser.error(f"--records: {args.records} are too few for batches on 1,024 ranks; give {LEAST} or more.")
    figures = [measure(args.records, world, args.seed) for world in WORLDS]
    rows, met = [], True
    for name, (unit, goal, most) in ROWS.items():
        values = [f[name] for f in figures]
        ok = None if goal is None else all(v <= goal if most else v >= goal for v in values)
        met &= ok is not False
        wanted = "" if goal is None else f"{'<=' if most else '>='} {goal:g}"
        rows.append([name, unit, *values, wanted, "" if ok is None else ok])
    columns = ["figure", "unit", *(f"{w:,} rank{'s' * (w > 1)}" for w in WORLDS), "goal", "result"]
    title = f"Schedule of {args.records:,} records, clips and stills half and half"
    report(title, columns, rows, args.json, records=args.records, seed=args.seed)
    return 0 if met else 1


# figure -> unit, goal (None: for the record), whether the goal is the most (or the least) it may be
ROWS: dict[str, tuple[str, float | None, bool]] = {
    "memory": ("bytes a record", 16, True),
    "start-up: group the index's rows, make the schedule": ("s", 10, True),
    "find any step": ("ms", 1, True),
    "the same after another number of ranks": ("ms", 1, True),
    "the same, and a rank's records of it": ("ms", None, True),
    "samples off a source's share, over any window": ("batches", 1, True),
    "records twice or never in a small epoch": ("records", 0, True),
    "the same, handed on through all numbers of ranks": ("records", 0, True),
    "records twice in a stretch": ("records", 0, True),
    "steps on which ranks disagree, or share a record": ("steps", 0, True),
    "positions twice or never when taken over": ("positions", 0, True),
    "mean rank's cost of a step over the slowest's": ("%", 97, False),
    "the same, each rank drawing at random": ("%", None, False),
    "the same, at random and in batches of 1": ("%", None, False),
    "mean step's cost over the costliest bucket's": ("%", None, False),
    "samples a step and rank": ("samples", None, False),
    "stills' part of the loss": ("%", None, False),
    "the same without loss weights": ("%", None, False),
}


def measure(records: int, world: int, seed: int) -> Figures:
    """Every figure of `ROWS` at this number of ranks."""
    print(f"{records:,} records, {world:,} ranks ...", file=sys.stderr, flush=True)
    rng = np.random.default_rng([seed, world])
    columns = simulate(records, rng)
    memory, seconds, schedule = start_up(columns, world, seed)
    full = [c.records for c in schedule.cells]
    small = [max(1, round(n * min(1, SMALL / records))) for n in full]
    far = 3 * records * len(full) // sum(c.batch * world for c in schedule.cells)  # some three epochs
    elsewhere = [make_schedule(full, w, seed) for w in WORLDS]
    after = [make_schedule(full, world, seed, s.state(int(rng.integers(far)))) for s in elsewhere]
    values = (
        memory / records,
        seconds,
        find(schedule, rng, far),
        max(find(s, rng, far, tries=50) for s in after),
        max(find(s, rng, far, tries=50, records=True) for s in after),
        share_error(schedule, rng, far),
        small_epoch(small, [world], seed),
        small_epoch(small, [world, *(w for w in WORLDS if w != world)], seed),
        repeats(schedule, int(rng.integers(far)), samples=min(500_000, records)),
        disagreements(full, world, seed, steps=rng.integers(far, size=3)),
        resumed(full, world, seed, rng, steps=20),
        *costs(schedule, rng, int(rng.integers(far)), steps=2000),
    )
    return dict(zip(ROWS, values, strict=True))


def simulate(records: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What an index knows of its rows: for each source, the number of every row's bucket (uint8)."""
    rows = {"clips": records // 2 // WINDOWS, "stills": records - records // 2}
    numbers = {name: np.repeat(np.arange(len(BUCKETS), dtype=np.uint8), PARTS[name]) for name in SHARES}
    return {name: numbers[name][rng.integers(256, size=n, dtype=np.uint8)] for name, n in rows.items()}


def start_up(columns: dict[str, np.ndarray], world: int, seed: int) -> tuple[int, float, Schedule]:
    """Bytes that remain, seconds until the schedule is there, and the schedule."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    begun = time.perf_counter()
    groups = make_groups(columns)
    schedule = make_schedule([len(g.rows) for g in groups], world, seed)
    seconds = time.perf_counter() - begun
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held, seconds, schedule


def make_groups(columns: dict[str, np.ndarray]) -> list[Group]:
    """The records of each source by bucket, as the index hands them to the stream: row and window of each."""
    groups = []
    for source, numbers in columns.items():
        for k, bucket in enumerate(BUCKETS):
            rows = np.flatnonzero(numbers == k).astype(np.uint32)
            windows = None
            if source == "clips":
                windows = np.tile(np.arange(WINDOWS, dtype=np.uint16), len(rows))
                rows = np.repeat(rows, WINDOWS)
            if len(rows):
                groups.append(Group(source=source, bucket=bucket, rows=rows, windows=windows))
    return groups


def make_schedule(records: Sequence[int], world: int, seed: int, used: Sequence[int] | None = None) -> Schedule:
    """The schedule over the cells of `PARTS`, with `records` in each."""
    places = [(source, b) for source, parts in PARTS.items() for b, part in zip(BUCKETS, parts) if part]
    cells = [
        Cell(source=source, bucket=b, records=n, batch=max(1, min(SIZES[b], n // (2 * world))))  # as the stream's
        for (source, b), n in zip(places, records, strict=True)
    ]
    return Schedule(cells, SHARES, seed=seed, world=world, used=used)


def find(schedule: Schedule, rng: np.random.Generator, far: int, tries: int = 200, records: bool = False) -> float:
    """Milliseconds to find a step below `far`, and a rank's `records` in it: the worst of `tries`, each of them
    the best of three, since the machine does other things too."""
    worst = 0.0
    for number in rng.integers(far, size=tries).tolist():
        best = float("inf")
        for _ in range(3):
            begun = time.perf_counter()
            step = next(schedule.steps(number))
            if records:
                schedule.records(step.cell, schedule.positions(step, schedule.world - 1))
            best = min(best, time.perf_counter() - begun)
        worst = max(worst, 1e3 * best)
    return worst


def share_error(schedule: Schedule, rng: np.random.Generator, far: int) -> float:
    """The most that the samples of a source differ from its share of all samples, over any window, in batches.

    Windows between any two of 20,000 steps in a row, and of 500 steps up to `far`.
    """
    start = int(rng.integers(far))
    base = np.array(schedule.state(start))
    given = np.array([c.batch * schedule.world for c in schedule.cells])
    made = np.zeros((20_001, len(base)), np.int64)
    for i, step in enumerate(islice(schedule.steps(start), 20_000)):
        made[i + 1, step.cell] = given[step.cell]
    others = np.array([schedule.state(int(k)) for k in rng.integers(far, size=500)])
    used = np.concatenate([base + made.cumsum(0), others])
    error = used[:, [c.source == "clips" for c in schedule.cells]].sum(1) - SHARES["clips"] * used.sum(1)
    return float(np.ptp(error) / given.max())


def small_epoch(records: Sequence[int], worlds: Sequence[int], seed: int) -> int:
    """Records not met exactly once in the first epoch of every cell, followed rank by rank, while each of `worlds`
    takes over from the one before for an equal part of it."""
    used = [0] * len(records)
    taken: list[list[np.ndarray]] = [[] for _ in records]
    for part, world in enumerate(worlds, start=1):
        schedule = make_schedule(records, world, seed, used)
        for step in schedule.steps():
            taken[step.cell] += [schedule.positions(step, rank) for rank in range(world)]
            used[step.cell] += schedule.cells[step.cell].batch * world
            if all(u >= n for u, n in zip(used, records)):
                break
            if part < len(worlds) and sum(used) >= sum(records) * part / len(worlds):
                break
    wrong = 0
    for cell, n in enumerate(records):
        followed = np.concatenate(taken[cell])
        seen = schedule.records(cell, followed[followed < n])
        wrong += int((np.bincount(seen, minlength=n) != 1).sum())
    return wrong


def repeats(schedule: Schedule, start: int, samples: int) -> int:
    """Records that all ranks together meet twice within one epoch, in about so many samples from `start` on."""
    taken: list[list[np.ndarray]] = [[] for _ in schedule.cells]
    for step in schedule.steps(start):
        taken[step.cell] += [schedule.positions(step, rank) for rank in range(schedule.world)]
        samples -= schedule.cells[step.cell].batch * schedule.world
        if samples <= 0:
            break
    twice = 0
    for cell, found in enumerate(taken):
        if found:
            positions = np.concatenate(found)
            n = schedule.cells[cell].records
            visits = positions // n * n + schedule.records(cell, positions)  # one number for each epoch and record
            twice += len(visits) - len(np.unique(visits))
    return twice


def disagreements(records: Sequence[int], world: int, seed: int, steps: np.ndarray) -> int:
    """Of `steps`, those on which two of the ranks, each with a schedule of its own, differ in the bucket, or
    take the same record."""
    ranks = [make_schedule(records, world, seed) for _ in range(world)]
    wrong = 0
    for number in steps.tolist():
        own = [next(schedule.steps(number)) for schedule in ranks]
        positions = np.concatenate([s.positions(step, r) for r, (s, step) in enumerate(zip(ranks, own))])
        met = ranks[0].records(own[0].cell, positions)
        fits = len(met) <= records[own[0].cell]
        wrong += len({(s.cell, s.first) for s in own}) > 1 or (fits and len(set(met.tolist())) < len(met))
    return wrong


def resumed(records: Sequence[int], world: int, seed: int, rng: np.random.Generator, steps: int) -> int:
    """Positions twice or never where `world` ranks go on, for `steps`, after runs on each of `WORLDS` that stopped
    at a random step of the first epochs."""
    wrong = 0
    for before in WORLDS:
        used = make_schedule(records, before, seed).state(int(rng.integers(sum(records) // before + 2)))
        schedule = make_schedule(records, world, seed, used)
        taken: list[list[np.ndarray]] = [[np.arange(0)] for _ in records]
        for step in islice(schedule.steps(), steps):
            taken[step.cell] += [schedule.positions(step, rank) for rank in range(world)]
        for cell, start in enumerate(used):
            positions = np.sort(np.concatenate(taken[cell]))
            wrong += int((positions != np.arange(start, start + len(positions))).sum())
    return wrong


def costs(schedule: Schedule, rng: np.random.Generator, start: int, steps: int) -> tuple[float, ...]:
    """The last figures of `ROWS`, over `steps` steps from `start` on."""
    cells = schedule.cells
    batch = np.array([c.batch for c in cells])
    of_one = np.array([step_cost(tokens(c.bucket, SHAPE), SHAPE.hidden_size) for c in cells])
    cost = batch * of_one
    size = {name: sum(c.records for c in cells if c.source == name) for name in SHARES}
    part = np.array([SHARES[c.source] * c.records / size[c.source] for c in cells])  # of all samples
    own = np.array([step.cell for step in islice(schedule.steps(start), steps)])
    by_rank = np.array([list(_cells_of_a_rank(schedule, start)) for _ in range(schedule.world)])
    drawn = rng.choice(len(cells), size=(schedule.world, steps), p=part / batch / (part / batch).sum())
    singly = rng.choice(len(cells), size=(schedule.world, steps), p=part)
    weights = np.array([schedule.loss_weight(c) for c in range(len(cells))])[own]
    still = np.array([c.source == "stills" for c in cells])[own]
    return (
        100 * cost[by_rank].mean() / cost[by_rank].max(0).mean(),
        100 * cost[drawn].mean() / cost[drawn].max(0).mean(),
        100 * of_one[singly].mean() / of_one[singly].max(0).mean(),
        100 * cost[own].mean() / cost.max(),
        batch[own].mean(),
        100 * weights[still].sum() / weights.sum(),
        100 * still.mean(),
    )


def _cells_of_a_rank(schedule: Schedule, start: int) -> Iterator[int]:
    """The cells that a rank takes at some steps from `start` on, by a schedule that it makes for itself."""
    own = Schedule(schedule.cells, SHARES, seed=schedule.seed, world=schedule.world)
    return (step.cell for step in islice(own.steps(start), STEPS_OF_EVERY_RANK))


if __name__ == "__main__":
    sys.exit(main())
