"""Rows that are read a batch at a time are what they are one by one: the same items, order and errors."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sat_ext.data.sources import read_source, tables
from sat_ext.data.sources.arrow import plain_items
from sat_ext.errors import DataError


@contextmanager
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(tables, "plain_items", lambda *_: None)
        yield


def outcome(path: Path, caplog: pytest.LogCaptureFixture) -> tuple[Any, list[str]]:
    """The items, or the error, and the warnings."""
    caplog.clear()
    try:
        found: Any = read_source(str(path))
    except DataError as error:
        found = str(error)
    return found, list(caplog.messages)


def some_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Rows as tables have them, with one that is unusual or wrong in every other table."""
    rows = [
        {
            "path": f"{rng.choice(['', 'clips/', 'x//', './', 'link/'])}{rng.choice('aB')}{rng.randrange(30)}.mp4",
            rng.choice(["caption", "text"]): rng.choice(
                ["A cat.", "", "two\nlines ", " Hut", "猫\u3000", "\u2028"]
            ),
            **rng.choice([{}, {"weight": 2}, {"start": 0.5, "end": 2}, {"fps": 12.5}, {"id": 7, "tags": ["a"]}]),
        }
        for _ in range(rng.randrange(1, 200))
    ]
    odd: list[dict[str, Any]] = [
        {"path": "a 1.mp4 "}, {"path": "é.mp4"}, {"path": "b\\c.mp4"}, {"path": "../a.mp4"}, {"path": "/etc/x"},
        {"path": "s3://bucket/a.mp4"}, {"path": "ftp://host/a.mp4"}, {"path": "a.mp4/.."}, {"path": "d/"},
        {"path": ""}, {"path": None}, {"path": 3}, {"path": "0.tar#a@0+5"}, {"path": "linked.mp4"},
        {"start": -1}, {"start": "1.5"}, {"end": 0.0}, {"start": 3, "end": 2}, {"weight": True}, {"fps": None},
        {"start": float("nan")}, {"end": float("inf")}, {"weight": 0}, {"caption": None}, {"text": 3},
        {"captions": ["a", "b"], "caption_weights": [1, 2]}, {"crop": [0, 0, 8, 8]}, {"captions": []},
        {"file": "other.mp4"}, {"image": None},
    ]  # fmt: skip
    if rng.random() < 0.8:
        rows[rng.randrange(len(rows))] |= rng.choice(odd)
    return rows


def make_files(folder: Path) -> None:
    (folder / "clips").mkdir()
    (folder / "real").mkdir()
    os.symlink("real", folder / "link")
    os.symlink("/etc/hostname", folder / "linked.mp4")


@pytest.mark.parametrize("seed", range(60))
def test_rows_of_jsonl_are_the_same_in_batches(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_files(tmp_path)
    rng = random.Random(seed)
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in some_rows(rng)]
    if rng.random() < 0.2:
        odd = ["", "[1]", "{", '{"path": "a"} {"path": "b"}', '{"path": "a.mp4", "caption": "x", "id": Inf}']
        lines[rng.randrange(len(lines))] = rng.choice([*odd, '{"path": "a", "path": "b.mp4", "text": ""}'])
    (tmp_path / "t.jsonl").write_bytes(rng.choice(["\n", "\r\n"]).join(lines).encode())
    found = outcome(tmp_path / "t.jsonl", caplog)
    with one_by_one(monkeypatch):
        assert outcome(tmp_path / "t.jsonl", caplog) == found


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_parquet_are_the_same_in_batches(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_files(tmp_path)
    rng = random.Random(seed)
    rows = some_rows(rng)
    names = {name for row in rows for name in row}
    try:
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    except pa.ArrowException:
        pytest.skip("a column of several types")
    pq.write_table(table, tmp_path / "t.parquet")
    found = outcome(tmp_path / "t.parquet", caplog)
    with one_by_one(monkeypatch):
        assert outcome(tmp_path / "t.parquet", caplog) == found


def test_usual_tables_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Information, nullified and -Infinity in a caption are words."""
    taken: list[bool] = []

    def seen(*arguments: Any) -> Any:
        taken.append((items := plain_items(*arguments)) is not None)
        return items

    monkeypatch.setattr(tables, "plain_items", seen)
    caption = 'Some Information, nullified (-Infinity), of Naples; 3 {"a": 1}\nand more'
    rows = [{"path": f"a/{n}.mp4", "caption": f"{caption} {n}", "id": n} for n in range(9000)]
    rows += [{"path": f"https://host/{n}.mp4?a=b", "caption": "x", "id": n} for n in range(10)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        assert len(read_source(str(tmp_path / name))) == len(rows)
    assert all(taken) and len(taken) >= 6


def test_the_order_of_keys_is_that_of_their_numbers(tmp_path: Path) -> None:
    rng = random.Random(0)
    parts = ["a", "B", "b", "0", "00", "9", "12", "/", "é", "ß", "İ", "-", "9" * 18, "1" * 25]
    names = ["".join(rng.choices(parts, k=rng.randint(1, 7))) + "x" for _ in range(5000)]
    rows = [{"path": f"https://host/{name}", "caption": "x"} for name in names]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [item.key for item in read_source(str(tmp_path / "t.jsonl"))]
    assert len(found) == len(set(found)) == len(names)
    assert found == sorted(found, key=lambda k: (re.sub("[0-9]+", lambda n: n[0].zfill(18), k.casefold()), k))
