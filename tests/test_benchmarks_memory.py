"""The benchmark of memory survives its rows, and ends in the time that it is given."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import carry
import memory
import memory_rows


def test_a_row_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found: str | None = None
    for seconds in (2.0, 20.0, 60.0):  # on a busy machine the child needs a while to begin
        found = memory.run([sys.executable, "-c", code], seconds)
        if (tmp_path / "pid").exists():
            break
    assert found is not None and found.startswith("ended after ")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        raise AssertionError("the child lives on")


def test_a_row_that_is_ended_while_it_compiles_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's extensions are compiled behind a file, for which every later run would wait."""
    monkeypatch.setattr(memory, "EXTENSIONS", tmp_path)
    code = "import os, time; open(os.path.join(os.environ['TORCH_EXTENSIONS_DIR'], 'lock'), 'w'); time.sleep(600)"
    assert memory.run([sys.executable, "-c", code], 5.0) == "ended after 5 s"
    assert not list(tmp_path.iterdir())


def test_a_row_that_dies_gives_its_last_line() -> None:
    assert memory.run([sys.executable, "-c", "raise MemoryError('of the GPU')"], 60) == "MemoryError: of the GPU"
    assert memory.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60) == "exit status -9"
    assert memory.run([sys.executable, "-c", ""], 60) is None


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`rows(arguments, seconds)`: the JSON after each row, of rows that take so long by a clock of the test's."""
    file, now, seen = tmp_path / "memory.json", [0.0], []
    for name in ("write_model", "write_media"):
        monkeypatch.setattr(memory, name, lambda *_, **__: None)
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])

    def run(*arguments: str, seconds: float) -> list[Any]:
        def row(name: str, row: Any, *_: Any, **__: Any) -> dict[str, Any]:
            if file.exists():
                seen.append(json.loads(file.read_text())["runs"])
            now[0] += seconds
            return {"error": "out of memory"}

        monkeypatch.setattr(memory, "run_row", row)
        options = ["memory.py", "--tiny", "--models", "cogvideox-2b", "--json", str(file), *arguments]
        monkeypatch.setattr(sys, "argv", options)
        assert memory.main() == 0
        return [*seen, json.loads(file.read_text())["runs"]]

    return run


def test_four_rows_in_eight_minutes_those_that_matter_first_and_the_others_named(rows: Any) -> None:
    found = rows("--minutes", "8", seconds=120.0)
    assert [len(kept) for kept in found[:3]] == [1, 2, 3]  # each is saved before the next begins
    done = [run["row"] for run in found[-1] if run["error"] != memory.NO_TIME]
    assert tuple(done) == memory_rows.FIRST and len(done) == 4
    assert len(found[-1]) == len(memory_rows.ROWS)


def test_without_a_time_all_rows_are_made_in_their_order(rows: Any) -> None:
    found = rows(seconds=1000.0)[-1]
    assert [run["row"] for run in found] == [row.name for row in memory_rows.ROWS]
    assert memory.NO_TIME not in {run["error"] for run in found}


def test_what_is_carried_has_a_version_for_the_gpu_machines_python() -> None:
    pinned = carry.versions("3.12")
    assert {name.lower() for name in carry.MISSING} <= pinned.keys()
    assert pinned["av"] != carry.versions("3.10")["av"]
