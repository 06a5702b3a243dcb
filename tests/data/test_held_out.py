"""The samples of an evaluation: every kind, on any number of ranks the same."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from sat_ext.data.held_out import HeldOut, steps_of
from sat_ext.data.index import build_index
from sat_ext.data.sources import SourceConfig
from tests.data.test_stream import config, stream_of
from tests.media import pattern, write_clip


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 clips and 20 stills."""
    folder = tmp_path_factory.mktemp("held_out")
    clip = write_clip(folder / "clip.mp4", frames=12, fps=8, size=(64, 64))
    clip.with_suffix(".txt").write_text("a clip")
    for i in range(79):
        for suffix in (".mp4", ".txt"):
            (folder / f"clip{i}{suffix}").hardlink_to(clip.with_suffix(suffix))
    for i in range(20):
        Image.fromarray(pattern(i, 64, 64)).save(folder / f"still{i}.png")
        (folder / f"still{i}.txt").write_text("a still")
    return folder


def seen(evaluation: HeldOut, world: int) -> Counter[tuple[str, str]]:
    """The samples that count, over all ranks."""
    found: Counter[tuple[str, str]] = Counter()
    for rank in range(world):
        for batch in islice(evaluation.batches(rank=rank), len(evaluation.steps)):
            assert batch["counted"] in (0, len(batch["key"]))
            found.update(list(zip(batch["kind"], batch["key"]))[: batch["counted"]])
    return found


def test_each_kind_is_in_an_evaluation_and_no_number_of_ranks_changes_it(held_out: Path) -> None:
    index = build_index([SourceConfig(path=str(held_out))], config())
    lists = []
    for world in (1, 2, 3):
        evaluation = HeldOut(stream_of(index, config(), batch=2), samples=8, world=world)
        lists.append(seen(evaluation, world))
    assert Counter(kind for kind, _ in lists[0]) == {"video": 6, "image": 2}
    assert lists[0] == lists[1] == lists[2]
    assert set(lists[0].values()) == {1}


def test_every_source_is_in_an_evaluation_of_fewer_samples_than_there_are_sources(held_out: Path) -> None:
    sources = [SourceConfig(path=str(held_out), name=name) for name in ("a", "b", "c")]
    evaluation = HeldOut(stream_of(build_index(sources, config()), config()), samples=1, world=2)
    kinds = {(step.cell, step.counted) for step in evaluation.steps}
    assert len(kinds) == 6
    assert {counted for _, counted in kinds} == {1}


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 5, 16, 23])
def test_ranks_take_as_many_samples_in_every_step_and_each_counts_once(world: int, samples: int) -> None:
    steps = list(steps_of(0, samples, batch=4, world=world))
    taken = [p for s in steps for rank in range(world) if s.counts(rank) for p in s.positions(rank)]
    assert sorted(taken) == list(range(samples))
    assert all(len(s.positions(rank)) == s.size <= 4 for s in steps for rank in range(world))
    assert all(p < samples for s in steps for rank in range(world) for p in s.positions(rank))


def test_workers_and_repeats_do_not_change_an_evaluation(held_out: Path) -> None:
    index = build_index([SourceConfig(path=str(held_out))], config())
    evaluation = HeldOut(stream_of(index, config()), samples=5, world=2)
    n = len(evaluation.steps)
    alone = [b["key"] for b in islice(evaluation.batches(rank=1), 2 * n)]
    assert alone[:n] == alone[n:]
    workers = [evaluation.batches(rank=1, worker=w, workers=3) for w in range(3)]
    assert [next(workers[i % 3])["key"] for i in range(2 * n)] == alone
