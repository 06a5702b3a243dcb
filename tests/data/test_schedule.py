"""The schedule's promises, over random data sets, shares, ranks and steps. No media needed."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sat_ext.data.permutation import permute
from sat_ext.data.schedule import WINDOW, Cell, Part, Schedule
from sat_ext.types import Bucket

Plan = tuple[list[Cell], dict[str, float], int | None]
Step = tuple[Part, ...]


def cell(source: str, frames: int, records: int, batch: int = 1) -> Cell:
    bucket = Bucket(frames=frames, height=64, width=64)
    return Cell(source=source, bucket=bucket, records=records, tokens=40 + 16 * frames, batch=batch)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Cells, shares, and a budget of tokens, or None where a step is one batch of one cell."""
    packs = draw(st.booleans())
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    frames = st.lists(st.sampled_from([1, 17, 33, 49]), min_size=1, max_size=4, unique=True)
    batches = st.just(1) if packs else st.integers(1, 12)
    cells = [cell(name, f, draw(st.integers(1, 300)), draw(batches)) for name in names for f in draw(frames)]
    budget = draw(st.integers(max(c.tokens for c in cells), 2000)) if packs else None
    return cells, {name: draw(st.floats(0.05, 1.0)) for name in names}, budget


worlds = st.sampled_from([1, 2, 3, 8])


def make(plan: Plan, world: int, used: tuple[int, ...] | None = None) -> Schedule:
    cells, shares, budget = plan
    return Schedule(cells, shares, seed=9, world=world, budget=budget, used=used)


def walk(schedule: Schedule, steps: int, start: int = 0) -> list[Step]:
    return list(islice(schedule.steps(start), steps))


def moved(schedule: Schedule, step: Step) -> np.ndarray:
    """Samples of each cell in a step, over all ranks."""
    out = np.zeros(len(schedule.cells), np.int64)
    for part in step:
        out[part.cell] += part.samples * schedule.world
    return out


@given(plans(), worlds, st.integers(0, 10**9))
@settings(deadline=None, max_examples=50)
def test_any_step_is_found_without_replay(plan: Plan, world: int, far: int) -> None:
    schedule = make(plan, world)
    used = np.zeros(len(schedule.cells), np.int64)
    for t, step in enumerate(walk(schedule, 150)):
        assert schedule.state(t) == tuple(used)
        assert [part.first for part in step] == [used[part.cell] for part in step]
        used += moved(schedule, step)
    (step,) = walk(schedule, 1, far)
    assert (np.subtract(schedule.state(far + 1), schedule.state(far)) == moved(schedule, step)).all()


@given(plans(), worlds)
@settings(deadline=None, max_examples=50)
def test_a_step_is_one_batch_or_a_pack_within_its_budget(plan: Plan, world: int) -> None:
    schedule = make(plan, world)
    steps = walk(schedule, 300)
    for step in steps:
        assert step and len({part.cell for part in step}) == len(step)
        if plan[2] is None:
            (part,) = step
            assert part.samples == schedule.cells[part.cell].batch
        else:
            assert sum(part.samples * schedule.cells[part.cell].tokens for part in step) <= plan[2]


@given(plans(), worlds)
@example(([*(cell("a", frames, 1) for frames in (1, 17, 33, 49)), cell("b", 1, 1)], {"a": 0.2, "b": 0.8}, None), 1)
@settings(deadline=None, max_examples=50)
def test_shares_are_exact_over_any_window(plan: Plan, world: int) -> None:
    cells, shares, budget = plan
    schedule = make(plan, world)
    counts = np.cumsum([moved(schedule, step) for step in walk(schedule, 300)], axis=0)
    batch = np.diff(counts.sum(1), prepend=0).max()
    usual = counts[-1] / 300 / world  # draws of a cell in a step
    bound = 3 * batch if budget is None else batch + 3 * world
    if budget and any(c.records // (2 * world) < 2 * (n + 1) for c, n in zip(cells, usual)):
        # a pack holds no record twice, so it has too little of such a cell; the last of a window make up for it
        packs = round(schedule.window / schedule.mean_samples)
        counts, bound = np.array([schedule.state(packs * n) for n in range(20)]), 4 * world
    for name, share in shares.items():
        own = counts[:, [c.source == name for c in cells]].sum(1)
        error = own - share / sum(shares.values()) * counts.sum(1)
        assert np.ptp(error) <= bound + 1e-6  # every window is the difference of two prefixes


@given(plans(), worlds, st.integers(0, 3000))
@settings(deadline=None, max_examples=50)
def test_each_record_is_used_once_before_any_is_used_twice(plan: Plan, world: int, steps: int) -> None:
    cells, shares, _ = plan
    schedule = make(plan, world)
    used = schedule.state(steps)
    for i, c in enumerate(cells):
        counts = Counter(schedule.records(i, np.arange(used[i])).tolist())
        times = [counts[r] for r in range(c.records)]
        assert max(times) - min(times) <= 1
    for name in shares:  # the cells of a source end an epoch together, within a few draws of each
        own = [(c.records, c.batch * world, u) for c, u in zip(cells, used) if c.source == name]
        epochs = sum(u for _, _, u in own) / sum(n for n, _, _ in own)
        slack = sum(3 * g for _, g, _ in own) / sum(n for n, _, _ in own)
        # more where a source of few records keeps packs small: they are filled with clips first
        assert all(abs(u / n - epochs) <= 5 * g / n + slack for n, g, u in own)


@given(st.integers(2, 200), st.integers(1, 12), worlds, st.integers(0, 300))
@settings(deadline=None)
def test_ranks_of_a_step_hold_disjoint_records(records: int, samples: int, world: int, at: int) -> None:
    only = cell("a", 1, records)
    schedule = Schedule([only], {"a": 1.0}, seed=2, world=world, budget=samples * only.tokens)
    ((part,),) = walk(schedule, 1, at)
    positions = np.concatenate([schedule.positions(part, r) for r in range(world)])
    assert positions.tolist() == list(range(part.first, part.first + part.samples * world))
    if part.samples * world <= records // 2:
        assert len(set(schedule.records(0, positions).tolist())) == part.samples * world


@given(
    st.lists(st.floats(0, 4), min_size=2, max_size=7), st.integers(1, 4), worlds, st.integers(1, 8), st.booleans()
)
@settings(deadline=None, max_examples=150)
def test_any_numbers_of_records_make_packs_that_hold_no_record_twice(
    powers: list[float], largest: int, world: int, more: int, apart: bool
) -> None:
    """Stills, and clips of up to seven lengths, each with 1 to 10,000 records, in one source or in two."""
    cells = [
        Cell(
            source="clips" if i and apart else "stills", bucket=Bucket(frames=1 + 8 * i, height=480, width=720),
            records=max(1, round(10**power)), tokens=226 + 1350 * (1 + 2 * i),
        )
        for i, power in enumerate(powers)
    ]  # fmt: skip
    budget = largest * (cells[-1].tokens + more * cells[0].tokens)
    schedule = Schedule(cells, {c.source: 1.0 for c in cells}, seed=0, world=world, budget=budget)
    for step in walk(schedule, 300):
        assert sum(part.samples * cells[part.cell].tokens for part in step) <= budget
        for part in step:
            assert part.samples <= max(2, cells[part.cell].records // (2 * world))


def test_few_records_make_small_packs_so_that_a_step_holds_none_twice() -> None:
    cells = [cell("stills", 1, 12), cell("clips", 49, 1000)]
    schedule = Schedule(cells, {"stills": 0.9, "clips": 0.1}, seed=2, world=2, budget=20 * cells[0].tokens)
    for step in walk(schedule, WINDOW):
        assert all(part.samples <= 3 for part in step if part.cell == 0)


@given(plans(), worlds, worlds, st.integers(0, 2000), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_other_ranks_continue_without_repeating_or_dropping(
    plan: Plan, world: int, new_world: int, steps: int, more: int
) -> None:
    first = make(plan, world)
    used = first.state(steps)
    second = make(plan, new_world, used)
    seen = [list(range(u)) for u in used]
    for step in walk(second, more):
        for part in step:
            seen[part.cell] += [p for r in range(new_world) for p in second.positions(part, r).tolist()]
    for i, positions in enumerate(seen):  # each position once, in order, none left out
        assert positions == list(range(len(positions)))
        stream = np.array(positions, dtype=np.int64)
        assert (first.records(i, stream) == second.records(i, stream)).all()
    assert second.state(more) == tuple(len(s) for s in seen)


def test_shares_hold_when_a_run_continues_with_other_ranks() -> None:
    plan = [cell("a", 49, 700), cell("b", 1, 900)], {"a": 0.6, "b": 0.4}, 2000
    used = make(plan, 8).state(1000)
    used = make(plan, 3, used).state(1000)
    assert abs(used[0] - 0.6 * sum(used)) <= 2 * 8


@given(plans(), worlds, st.integers(0, 300), st.data())
@settings(deadline=None, max_examples=50)
def test_any_step_is_found_where_the_cells_do_not_keep_pace(
    plan: Plan, world: int, step: int, data: st.DataObject
) -> None:
    """As after a run with other shares, or before files were added."""
    used = np.array([data.draw(st.sampled_from([0, 10, 1000, 10**5])) for _ in plan[0]])
    schedule = make(plan, world, tuple(used.tolist()))
    for done in walk(schedule, step):
        used += moved(schedule, done)
    assert schedule.state(step) == tuple(used)


@given(plans(), worlds)
@settings(deadline=None, max_examples=50)
def test_the_mean_number_of_samples_of_a_step_is_the_mean(plan: Plan, world: int) -> None:
    schedule = make(plan, world)
    total = sum(schedule.state(10**7)) / world / 10**7
    assert schedule.mean_samples == pytest.approx(total, rel=1e-4)


@given(plans(), worlds)
@settings(deadline=None, max_examples=50)
def test_a_source_counts_its_share_of_all_samples(plan: Plan, world: int) -> None:
    cells, shares, _ = plan
    used = make(plan, world).state(10**7)
    for name, share in shares.items():
        own = sum(u for u, c in zip(used, cells) if c.source == name)
        assert own / sum(used) == pytest.approx(share / sum(shares.values()), rel=1e-4)


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


def test_epochs_and_seeds_differ_in_order() -> None:
    one, two = (Schedule([cell("a", 1, 1000)], {"a": 1.0}, seed=s, world=1) for s in (1, 2))
    first, second = one.records(0, np.arange(1000)), one.records(0, np.arange(1000, 2000))
    assert (first == second).mean() < 0.02
    assert (first == two.records(0, np.arange(1000))).mean() < 0.02
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
