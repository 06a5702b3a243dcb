"""The benchmark of the schedule runs, says what it saw, and notices what is wrong. Nothing is timed here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sat_ext.data.schedule import Part, Schedule

FOLDER = Path(__file__).parent.parent / "benchmarks"
TIMES = {
    "start-up: group the index's rows, make the schedule",
    "find any step",
    "the same after another number of ranks",
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_schedule", FOLDER / "schedule.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORLDS", (1, 4))
    monkeypatch.setattr(module, "SMALL", 10_000)
    monkeypatch.setattr(module, "LEAST", 10_000)
    return module


def missed(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    out = tmp_path / "out" / "schedule.json"
    monkeypatch.setattr("sys.argv", ["schedule.py", "--records", "20000", "--json", str(out)])
    code = benchmark.main()
    saved = json.loads(out.read_text())
    assert saved["records"] == 20_000 and saved["machine"]["cores"] >= 1
    found = {row["figure"] for row in saved["rows"] if row["result"] is False}
    assert code == bool(found)
    return found - TIMES


def test_every_goal_but_those_of_speed_is_met_at_a_small_size(benchmark, monkeypatch, tmp_path, capsys):
    assert missed(benchmark, monkeypatch, tmp_path) == set()
    shown = capsys.readouterr().out
    assert "Schedule of 20,000 records" in shown and "4 ranks" in shown and "met" in shown


def test_an_order_that_repeats_records_is_noticed(benchmark, monkeypatch, tmp_path):
    def pairs(self: Schedule, cell: int, positions: np.ndarray) -> np.ndarray:
        return positions // 2 % self.cells[cell].records

    monkeypatch.setattr(Schedule, "records", pairs)
    assert missed(benchmark, monkeypatch, tmp_path) == {
        "records twice or never in a small epoch",
        "the same, handed on through all numbers of ranks",
        "records twice in a stretch",
        "steps on which ranks disagree, or share a record",
    }


def test_ranks_that_take_the_same_positions_are_noticed(benchmark, monkeypatch, tmp_path):
    def same(self: Schedule, part: Part, rank: int) -> np.ndarray:
        return part.first + np.arange(part.samples)

    monkeypatch.setattr(Schedule, "positions", same)
    assert {
        "records twice or never in a small epoch",
        "steps on which ranks disagree, or share a record",
        "positions twice or never when taken over",
    } <= missed(benchmark, monkeypatch, tmp_path)


def test_too_few_records_are_refused(benchmark, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["schedule.py", "--records", "5"])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert "--records: 5 are too few for batches on 1,024 ranks; give 10000 or more." in capsys.readouterr().err
