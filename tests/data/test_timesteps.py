"""The places of an update's samples in the range of timesteps."""

import numpy as np
import pytest

from sat_ext.data.schedule import Cell, Schedule
from sat_ext.data.timesteps import stratified_places
from sat_ext.types import Bucket


def schedule_of(world: int, seed: int = 0) -> Schedule:
    cells = [
        Cell(source=source, bucket=Bucket(frames=f, height=64, width=64), records=500, tokens=50 * f)
        for source, f in (("clips", 9), ("clips", 17), ("stills", 1))
    ]
    return Schedule(cells, {"clips": 0.4, "stills": 0.6}, seed=seed, world=world, budget=1500)


def of_update(schedule: Schedule, update: int, accumulation: int) -> dict[str, np.ndarray]:
    """Places by source, of all ranks and steps."""
    found: dict[str, list[np.ndarray]] = {"clips": [], "stills": []}
    for step in range(update * accumulation, (update + 1) * accumulation):
        for rank in range(schedule.world):
            places = stratified_places(schedule, step, rank, accumulation=accumulation)
            for part, of_part in zip(schedule.step(step), places, strict=True):
                assert of_part.shape == (part.samples,)
                found[schedule.cells[part.cell].source].append(of_part)
    return {source: np.concatenate(places) for source, places in found.items() if places}


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_samples_of_a_source_have_a_part_of_the_range_each(world: int, accumulation: int) -> None:
    schedule = schedule_of(world)
    for update in range(50):
        for places in of_update(schedule, update, accumulation).values():
            count = len(places)
            assert sorted(np.floor(places * count).astype(int).tolist()) == list(range(count))


def test_every_place_is_as_likely_for_each_sample() -> None:
    schedule = schedule_of(1)
    stills = [of_update(schedule, update, 1).get("stills", np.zeros(0)) for update in range(4000)]
    stills = [places for places in stills if len(places) > 1]
    first, last = (np.array([places[i] for places in stills]) for i in (0, -1))
    expected, deviation = len(first) / 10, (len(first) * 0.09) ** 0.5
    counts, _ = np.histogram(first, bins=10, range=(0, 1))
    assert abs(counts - expected).max() < 4 * deviation
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.08  # one update tells nothing of the next
    assert np.corrcoef(first, last)[0, 1] < 0.05  # in an update they avoid each other


def test_no_bucket_and_no_rank_sees_one_part_of_the_range_more_often() -> None:
    """Five samples a step, of which the clip is always the last: a permutation of five alone is not uniform."""
    cells = [
        Cell(source="all", bucket=Bucket(frames=f, height=64, width=64), records=100 * n, tokens=50 * f)
        for f, n in ((1, 4), (9, 1))
    ]
    schedule = Schedule(cells, {"all": 1.0}, seed=0, world=1, budget=650)
    places: dict[int, list[float]] = {0: [], 1: []}
    for step in range(6000):
        for part, of_part in zip(schedule.step(step), stratified_places(schedule, step, 0, accumulation=1)):
            places[part.cell] += of_part.tolist()
    for of_cell in places.values():
        counts, _ = np.histogram(of_cell, bins=5, range=(0, 1))
        expected = len(of_cell) / 5
        assert abs(counts - expected).max() < 4 * (0.8 * expected) ** 0.5, counts / expected


def test_an_update_may_begin_at_any_step() -> None:
    schedule = schedule_of(2)
    for origin in (1, 2, 5):
        places: dict[str, list[float]] = {}
        for step in range(origin, origin + 3):
            for rank in range(2):
                found = stratified_places(schedule, step, rank, accumulation=3, origin=origin)
                for part, of_part in zip(schedule.step(step), found, strict=True):
                    places.setdefault(schedule.cells[part.cell].source, []).extend(of_part)
        for of in places.values():
            assert sorted(np.floor(np.array(of) * len(of)).astype(int).tolist()) == list(range(len(of)))


def test_they_follow_from_seed_step_and_rank_alone() -> None:
    one, two, other = schedule_of(2), schedule_of(2), schedule_of(2, seed=1)
    for step in (0, 7, 10**6):
        places = [stratified_places(s, step, 1, accumulation=2)[0] for s in (one, two, other)]
        assert (places[0] == places[1]).all()
        assert (places[0] != places[2]).any()
