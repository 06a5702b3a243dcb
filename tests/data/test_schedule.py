"""The schedule's promises, over random data sets, shares, ranks and steps. No media needed."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat_ext.data.schedule import Cell, Schedule, Step, permute
from sat_ext.types import Bucket

Plan = tuple[list[Cell], dict[str, float]]


def cell(source: str, frames: int, records: int, batch: int) -> Cell:
    return Cell(source=source, bucket=Bucket(frames=frames, height=64, width=64), records=records, batch=batch)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = [f"s{i}" for i in range(draw(st.integers(1, 4)))]
    frames = st.lists(st.sampled_from([1, 17, 33, 49]), min_size=1, max_size=4, unique=True)
    cells = [
        cell(name, f, draw(st.integers(1, 300)), draw(st.integers(1, 12))) for name in names for f in draw(frames)
    ]
    return cells, {name: draw(st.floats(0.05, 1.0)) for name in names}


worlds = st.sampled_from([1, 2, 3, 8])


def walk(schedule: Schedule, steps: int, start: int = 0) -> list[Step]:
    return list(islice(schedule.steps(start), steps))


@given(plans(), worlds, st.integers(0, 10**9))
@settings(deadline=None, max_examples=50)
def test_any_step_is_found_without_replay(plan: Plan, world: int, far: int) -> None:
    cells, shares = plan
    schedule = Schedule(cells, shares, seed=1, world=world)
    used = [0] * len(cells)
    for t, step in enumerate(walk(schedule, 150)):
        assert schedule.state(t) == tuple(used)
        assert step.first == used[step.cell]
        used[step.cell] += cells[step.cell].batch * world
    (step,) = walk(schedule, 1, far)
    moved = [b - a for a, b in zip(schedule.state(far), schedule.state(far + 1))]
    assert moved == [cells[step.cell].batch * world if c == step.cell else 0 for c in range(len(cells))]


@given(plans(), worlds)
@settings(deadline=None, max_examples=50)
def test_shares_are_exact_over_any_window(plan: Plan, world: int) -> None:
    cells, shares = plan
    names = list(shares)
    largest = {n: max(c.batch for c in cells if c.source == n) * world for n in names}
    counts = np.zeros((301, len(names)))
    for t, step in enumerate(walk(Schedule(cells, shares, seed=1, world=world), 300)):
        counts[t + 1] = counts[t]
        counts[t + 1, names.index(cells[step.cell].source)] += cells[step.cell].batch * world
    for i, n in enumerate(names):
        p = shares[n] / sum(shares.values())
        error = counts[:, i] - p * counts.sum(1)
        bound = ((1 - p) * largest[n] + p * sum(largest[m] for m in names if m != n)) / 2
        window = error.max() - error.min()  # every window is the difference of two prefixes
        assert np.abs(error).max() <= bound + 1e-6
        assert window <= 2 * bound + 1e-6
        if len(names) == 2:
            assert window <= max(largest.values()) + 1e-6  # one batch


@given(plans(), worlds, st.integers(0, 400))
@settings(deadline=None, max_examples=50)
def test_each_record_is_used_once_before_any_is_used_twice(plan: Plan, world: int, steps: int) -> None:
    cells, shares = plan
    schedule = Schedule(cells, shares, seed=5, world=world)
    used = schedule.state(steps)
    for i, c in enumerate(cells):
        counts = Counter(schedule.records(i, np.arange(used[i])).tolist())
        times = [counts[r] for r in range(c.records)]
        assert max(times) - min(times) <= 1
    for name in shares:  # the cells of a source end an epoch together, within one batch of each of them
        own = [(c.records, c.batch * world, u) for c, u in zip(cells, used) if c.source == name]
        epochs = sum(u for _, _, u in own) / sum(n for n, _, _ in own)
        slack = sum(g for _, g, _ in own) / sum(n for n, _, _ in own)
        assert all(abs(u / n - epochs) <= g / n + slack for n, g, u in own)


@given(st.integers(2, 200), st.integers(1, 12), worlds, st.integers(0, 300))
@settings(deadline=None)
def test_ranks_of_a_step_hold_disjoint_records(records: int, batch: int, world: int, at: int) -> None:
    batch = max(1, min(batch, records // (2 * world)))
    schedule = Schedule([cell("a", 1, records, batch)], {"a": 1.0}, seed=2, world=world)
    (step,) = walk(schedule, 1, at)
    positions = np.concatenate([schedule.positions(step, r) for r in range(world)])
    assert positions.tolist() == list(range(step.first, step.first + batch * world))
    if batch * world <= records // 2:
        assert len(set(schedule.records(0, positions).tolist())) == batch * world


@given(plans(), worlds, worlds, st.integers(0, 200), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_other_ranks_go_on_without_repeating_or_dropping(
    plan: Plan, world: int, new_world: int, steps: int, more: int
) -> None:
    cells, shares = plan
    first = Schedule(cells, shares, seed=9, world=world)
    used = first.state(steps)
    second = Schedule(cells, shares, seed=9, world=new_world, used=used)
    seen = [list(range(u)) for u in used]
    for step in walk(second, more):
        seen[step.cell] += [p for r in range(new_world) for p in second.positions(step, r).tolist()]
    for i, positions in enumerate(seen):  # each position once, in order, none left out
        assert positions == list(range(len(positions)))
        stream = np.array(positions, dtype=np.int64)
        assert (first.records(i, stream) == second.records(i, stream)).all()
    assert second.state(more) == tuple(len(s) for s in seen)


def test_shares_hold_when_a_run_goes_on_with_other_ranks() -> None:
    cells = [cell("a", 49, 700, 1), cell("b", 1, 900, 8)]
    shares = {"a": 0.6, "b": 0.4}
    used = Schedule(cells, shares, seed=0, world=8).state(1000)
    used = Schedule(cells, shares, seed=0, world=3, used=used).state(1000)
    assert abs(used[0] - 0.6 * sum(used)) <= 8 * 8 / 2


@given(plans(), worlds, st.integers(0, 300), st.data())
@settings(deadline=None, max_examples=50)
def test_any_step_is_found_where_the_cells_do_not_keep_pace(
    plan: Plan, world: int, step: int, data: st.DataObject
) -> None:
    """As after a run with other shares, or before files were added."""
    cells, shares = plan
    used = [data.draw(st.sampled_from([0, 10, 1000, 10**5])) for _ in cells]
    schedule = Schedule(cells, shares, seed=9, world=world, used=used)
    for done in walk(schedule, step):
        assert done.first == used[done.cell]
        used[done.cell] += cells[done.cell].batch * world
    assert schedule.state(step) == tuple(used)


def test_a_step_weighs_what_its_samples_do_worked_by_hand() -> None:
    cells = [cell("stills", 1, 1100, 11), cell("clips", 49, 100, 1)]
    schedule = Schedule(cells, {"stills": 0.5, "clips": 0.5}, seed=0, world=1)
    # 0.5 / 11 + 0.5 / 1 = 6 / 11 batches a sample; times the batches of 11 and 1
    assert schedule.loss_weight(0) == pytest.approx(6)
    assert schedule.loss_weight(1) == pytest.approx(6 / 11)
    steps = [s.cell for s in walk(schedule, 12)]
    assert (steps.count(0), steps.count(1)) == (1, 11)
    assert steps.count(0) * schedule.loss_weight(0) == pytest.approx(steps.count(1) * schedule.loss_weight(1))
    assert sum(schedule.loss_weight(c) for c in steps) == pytest.approx(12)


def test_a_source_in_two_buckets_weighs_by_its_records_in_each() -> None:
    cells = [cell("stills", 1, 50, 8), cell("clips", 17, 300, 2), cell("clips", 49, 100, 1)]
    schedule = Schedule(cells, {"stills": 1.0, "clips": 3.0}, seed=0, world=4)
    # parts of the samples: 1/4, 3/4 * 3/4 = 9/16, 3/4 * 1/4 = 3/16; batches a sample: 1/32 + 9/32 + 6/32 = 1/2
    assert [schedule.loss_weight(c) for c in range(3)] == pytest.approx([4, 1, 0.5])


@given(plans(), worlds, st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_with_its_loss_weight_every_sample_counts_alike_and_the_mean_weight_is_1(
    plan: Plan, world: int, start: int
) -> None:
    cells, shares = plan
    schedule = Schedule(cells, shares, seed=3, world=world)
    weights = [schedule.loss_weight(c) for c in range(len(cells))]
    assert np.ptp([w / c.batch for w, c in zip(weights, cells)]) < 1e-9 * max(weights)  # what one sample counts
    n = 10**7
    steps = np.subtract(schedule.state(start + n), schedule.state(start)) / [c.batch * world for c in cells]
    assert steps.sum() == pytest.approx(n)
    assert (steps * weights).sum() / n == pytest.approx(1, rel=1e-3)
    names = list(shares)
    say = [sum(s * w for s, w, c in zip(steps, weights, cells) if c.source == name) for name in names]
    wanted = [n * shares[name] / sum(shares.values()) for name in names]
    assert say == pytest.approx(wanted, rel=1e-3)  # of each source in the sum of all losses: its share


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    keys = np.full(size, key, dtype=np.uint64)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


def test_epochs_and_seeds_differ_in_order() -> None:
    one, two = (Schedule([cell("a", 1, 1000, 1)], {"a": 1.0}, seed=s, world=1) for s in (1, 2))
    first, second = one.records(0, np.arange(1000)), one.records(0, np.arange(1000, 2000))
    assert (first == second).mean() < 0.02
    assert (first == two.records(0, np.arange(1000))).mean() < 0.02
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
