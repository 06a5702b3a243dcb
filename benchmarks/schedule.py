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
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from report import report

from sat_ext.cogvideox import SequenceShape, tokens
from sat_ext.data.buckets import BucketConfig, batch_sizes, make_buckets, pack_budget, step_cost
from sat_ext.data.index import Group
from sat_ext.data.schedule import Cell, Part, Schedule

WORLDS = (1, 8, 64, 1024)
SHARES = {"clips": 0.5, "stills": 0.5}
SHAPE = SequenceShape()  # CogVideoX-5B
BUCKETS = make_buckets(
    BucketConfig(frames=(1, 17, 33, 49), sizes=((480, 720), (720, 480), (576, 576))), None, None
)
SIZES = batch_sizes(BUCKETS, largest=1, shape=SHAPE)
BUDGET = pack_budget(BUCKETS, largest=1, shape=SHAPE)
# Of 256 records of a source: how many fall into each bucket. A made-up data set, uneven as real ones are.
PARTS = {"clips": (0, 0, 0, 40, 20, 10, 50, 20, 6, 80, 20, 10), "stills": (128, 76, 52, 0, 0, 0, 0, 0, 0, 0, 0, 0)}
WINDOWS = 2  # of every clip, as `all_windows` makes them
SMALL = LEAST = 200_000  # records that are followed one by one through an epoch
RANKS = 16  # that make a schedule of their own, to compare

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
    "samples off a source's share, over any window": ("packs", 1, True),
    "the same in steps of one bucket": ("batches", 2.5, True),
    "records twice or never in a small epoch": ("records", 0, True),
    "the same, handed on through all numbers of ranks": ("records", 0, True),
    "records twice in a stretch": ("records", 0, True),
    "steps on which ranks disagree, or share a record": ("steps", 0, True),
    "positions twice or never when taken over": ("positions", 0, True),
    "tokens of a pack over its budget": ("%", 95, False),
    "of the fullest": ("%", 100, True),
    "mean pack's cost over the costliest's": ("%", 85, False),
    "the most that any order of such packs can have": ("%", None, False),
    "the same, one bucket a step": ("%", None, False),
    "the same, of one clip of 49 frames and one still a pack": ("%", 99, False),
    "mean rank's cost of a step over the slowest's, each rank drawing at random": ("%", None, False),
    "samples a step and rank": ("samples", None, False),
    "stills' part of the samples": ("%", None, False),
}


def measure(records: int, world: int, seed: int) -> Figures:
    """Every figure of `ROWS` at this number of ranks."""
    print(f"{records:,} records, {world:,} ranks ...", file=sys.stderr, flush=True)
    rng = np.random.default_rng([seed, world])
    columns = simulate(records, rng)
    memory, seconds, schedule = start_up(columns, world, seed)
    full = [c.records for c in schedule.cells]
    small = [max(1, round(n * min(1, SMALL / records))) for n in full]
    far = int(3 * records / (schedule.mean_samples * world))  # some three epochs
    elsewhere = [make_schedule(full, w, seed) for w in WORLDS]
    after = [make_schedule(full, world, seed, s.state(int(rng.integers(far)))) for s in elsewhere]
    batches = make_schedule(full, world, seed, packs=False)
    values = (
        memory / records,
        seconds,
        find(schedule, rng, far),
        max(find(s, rng, far, tries=50) for s in after),
        max(find(s, rng, far, tries=50, records=True) for s in after),
        share_error(schedule, rng, far),
        share_error(batches, rng, far),
        small_epoch(small, [world], seed),
        small_epoch(small, [world, *(w for w in WORLDS if w != world)], seed),
        repeats(schedule, int(rng.integers(far)), samples=min(500_000, records)),
        disagreements(full, world, seed, steps=rng.integers(far, size=3)),
        resumed(full, world, seed, rng, steps=20),
        *costs(schedule, batches, rng, int(rng.integers(far)), steps=2000),
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


def make_schedule(
    records: Sequence[int], world: int, seed: int, used: Sequence[int] | None = None, packs: bool = True
) -> Schedule:
    """The schedule over the cells of `PARTS`, with `records` in each: of packs, or of one bucket a step."""
    places = [(source, b) for source, parts in PARTS.items() for b, part in zip(BUCKETS, parts) if part]
    cells = [
        Cell(
            source=source, bucket=b, records=n, tokens=tokens(b, SHAPE),
            batch=1 if packs else max(1, min(SIZES[b], n // (2 * world))),  # as the stream's
        )
        for (source, b), n in zip(places, records, strict=True)
    ]  # fmt: skip
    return Schedule(cells, SHARES, seed=seed, world=world, budget=BUDGET if packs else None, used=used)


def find(schedule: Schedule, rng: np.random.Generator, far: int, tries: int = 200, records: bool = False) -> float:
    """Milliseconds to find a step below `far` with nothing in the cache, and a rank's `records` in it: the worst
    of `tries`, each of them the best of three, since the machine does other things too."""
    worst = 0.0
    for number in rng.integers(far, size=tries).tolist():
        best = float("inf")
        for _ in range(3):
            schedule._window.cache_clear()
            begun = time.perf_counter()
            step = schedule.step(number)
            for part in step if records else ():
                schedule.records(part.cell, schedule.positions(part, schedule.world - 1))
            best = min(best, time.perf_counter() - begun)
        worst = max(worst, 1e3 * best)
    return worst


def share_error(schedule: Schedule, rng: np.random.Generator, far: int) -> float:
    """The most that the samples of a source differ from its share of all samples, over any window, in the samples
    of the largest step. Windows between any two of 20,000 steps in a row, and of 500 steps up to `far`."""
    start = int(rng.integers(far))
    made = np.array([taken(schedule, step) for step in islice(schedule.steps(start), 20_000)])
    near = np.array(schedule.state(start)) + made.cumsum(0)
    used = np.concatenate([near, [schedule.state(int(k)) for k in rng.integers(far, size=500)]])
    error = used[:, [c.source == "clips" for c in schedule.cells]].sum(1) - SHARES["clips"] * used.sum(1)
    return float(np.ptp(error) / made.sum(1).max())


def taken(schedule: Schedule, step: Sequence[Part]) -> np.ndarray:
    """Samples of each cell in a step, over all ranks."""
    out = np.zeros(len(schedule.cells), dtype=np.int64)
    for part in step:
        out[part.cell] += part.samples * schedule.world
    return out


def positions(schedule: Schedule, step: Sequence[Part]) -> Iterator[tuple[int, np.ndarray]]:
    """Cell and positions of each part and rank."""
    for part in step:
        for rank in range(schedule.world):
            yield part.cell, schedule.positions(part, rank)


def small_epoch(records: Sequence[int], worlds: Sequence[int], seed: int) -> int:
    """Records not met exactly once in the first epoch of every cell, followed rank by rank, while each of `worlds`
    takes over from the one before for an equal part of it."""
    used = np.zeros(len(records), dtype=np.int64)
    found: list[list[np.ndarray]] = [[] for _ in records]
    for part, world in enumerate(worlds, start=1):
        schedule = make_schedule(records, world, seed, used.tolist())
        for step in schedule.steps():
            for cell, of_rank in positions(schedule, step):
                found[cell].append(of_rank)
            used += taken(schedule, step)
            if (used >= records).all():
                break
            if part < len(worlds) and used.sum() >= sum(records) * part / len(worlds):
                break
    wrong = 0
    for cell, n in enumerate(records):
        followed = np.concatenate(found[cell])
        seen = schedule.records(cell, followed[followed < n])
        wrong += int((np.bincount(seen, minlength=n) != 1).sum())
    return wrong


def repeats(schedule: Schedule, start: int, samples: int) -> int:
    """Records that all ranks together meet twice within one epoch, in about so many samples from `start` on."""
    found: list[list[np.ndarray]] = [[] for _ in schedule.cells]
    for step in schedule.steps(start):
        for cell, of_rank in positions(schedule, step):
            found[cell].append(of_rank)
            samples -= len(of_rank)
        if samples <= 0:
            break
    twice = 0
    for cell, followed in enumerate(found):
        if followed:
            of_cell = np.concatenate(followed)
            n = schedule.cells[cell].records
            visits = of_cell // n * n + schedule.records(cell, of_cell)  # one number for each epoch and record
            twice += len(visits) - len(np.unique(visits))
    return twice


def disagreements(records: Sequence[int], world: int, seed: int, steps: np.ndarray) -> int:
    """Of `steps`, those on which two of the ranks, each with a schedule of its own, differ, or take the same
    record."""
    ranks = [make_schedule(records, world, seed) for _ in range(min(world, RANKS))]
    wrong = 0
    for number in steps.tolist():
        own = [schedule.step(number) for schedule in ranks]
        shared = False
        for part in own[0]:
            met = [ranks[0].records(part.cell, ranks[0].positions(part, rank)) for rank in range(world)]
            every = np.concatenate(met)
            shared |= len(every) <= records[part.cell] and len(np.unique(every)) < len(every)
        wrong += len(set(own)) > 1 or shared
    return wrong


def resumed(records: Sequence[int], world: int, seed: int, rng: np.random.Generator, steps: int) -> int:
    """Positions twice or never where `world` ranks continue, for `steps`, after runs on each of `WORLDS` that
    stopped at a random step of the first epochs."""
    wrong = 0
    for before in WORLDS:
        used = make_schedule(records, before, seed).state(int(rng.integers(sum(records) // before + 2)))
        schedule = make_schedule(records, world, seed, used)
        found: list[list[np.ndarray]] = [[np.arange(0)] for _ in records]
        for step in islice(schedule.steps(), steps):
            for cell, of_rank in positions(schedule, step):
                found[cell].append(of_rank)
        for cell, start in enumerate(used):
            of_cell = np.sort(np.concatenate(found[cell]))
            wrong += int((of_cell != np.arange(start, start + len(of_cell))).sum())
    return wrong


def costs(
    schedule: Schedule, batches: Schedule, rng: np.random.Generator, start: int, steps: int
) -> tuple[float, ...]:
    """The last figures of `ROWS`, over `steps` steps from `start` on."""
    cells = schedule.cells
    length = np.array([c.tokens for c in cells])
    cost = np.array([step_cost(c.tokens, SHAPE.hidden_size) for c in cells])
    packs, own = (
        np.array([taken(s, step) for step in islice(s.steps(start), steps)]) // s.world
        for s in (schedule, batches)
    )
    full, work = packs @ length / BUDGET, packs @ cost
    mean = packs.sum(0) @ cost / (packs.sum(0) @ length)  # cost of a token
    bound = mean * BUDGET / cost.max()  # all packs full, the costliest no dearer than its clip alone
    even = Schedule(
        [replace(cells[i], records=1000) for i in (int(length.argmax()), int(length.argmin()))], SHARES,
        seed=0, world=1, budget=BUDGET,
    )  # fmt: skip
    pair = [sum(p.samples * step_cost(even.cells[p.cell].tokens, SHAPE.hidden_size) for p in even.step(i))
            for i in range(1000)]  # fmt: skip
    part = packs.sum(0) / packs.sum()
    drawn = cost[rng.choice(len(cells), size=(schedule.world, steps), p=part)]
    stills = [c.source == "stills" for c in cells]
    return (
        100 * full.mean(),
        100 * full.max(),
        100 * work.mean() / work.max(),
        100 * min(1.0, bound),
        100 * (own @ cost).mean() / (own @ cost).max(),
        100 * float(np.mean(pair) / np.max(pair)),
        100 * drawn.mean() / drawn.max(0).mean(),
        packs.sum(1).mean(),
        100 * packs[:, stills].sum() / packs.sum(),
    )


if __name__ == "__main__":
    sys.exit(main())
