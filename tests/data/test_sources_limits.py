"""Lists that are larger than they look, or than any list of files: one sentence, and no memory or time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sat_ext.data.sources import read_source
from sat_ext.errors import DataError
from tests.servers import http_server

GIGABYTE = 1 << 30
READ = """
import sys, resource
from sat_ext.data.sources import read_source
from sat_ext.errors import DataError
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    print(len(read_source(sys.argv[1])))
except DataError as error:
    print(error)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def sparse(path: Path, start: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(8 * GIGABYTE)
    return path


def sparse_jsonl(folder: Path) -> Path:
    return sparse(folder / "t.jsonl", b'{"path": "a.png", "caption": "' + b"x" * 5000)


def sparse_csv(folder: Path) -> Path:
    return sparse(folder / "t.csv", b'path,caption\na.png,"' + b"x" * 5000)


def sparse_prompts(folder: Path) -> Path:
    sparse(folder / "prompts.txt", b"x" * 5000)
    (folder / "images.txt").write_text("a.png")
    return folder


def many_rows(folder: Path) -> Path:
    """20 million rows, one value for all: 12 GB of items."""
    rows = 20_000_000
    one = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), rows), pa.array(["a.png"]))
    pq.write_table(pa.table({"path": one, "caption": one}), folder / "t.parquet")
    return folder / "t.parquet"


def long_values(folder: Path, value: str = "x" * (1 << 20), column: str = "caption") -> Path:
    """A value of 1 MiB for each of 20,000 rows, written once: batches of gigabytes."""
    names = pa.array([f"{n}.png" for n in range(20_000)])
    one = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), 20_000), pa.array([value]))
    pq.write_table(pa.table({"path": names, column: one, "text": names}), folder / "t.parquet", compression="zstd")
    return folder / "t.parquet"


def long_list(folder: Path) -> Path:
    """Lists of 100,000 numbers that take a few bytes."""
    crop = pa.repeat(pa.scalar([1] * 100_000, pa.list_(pa.int8())), 600)
    names = pa.array([f"{n}.png" for n in range(600)])
    pq.write_table(pa.table({"path": names, "caption": names, "crop": crop}), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (sparse_jsonl, r"t\.jsonl, line 1: longer than 4194304 letters; a line is for one file"),
        (sparse_csv, r"t\.csv, line 2: longer than 4194304 letters"),
        (sparse_prompts, r"prompts\.txt, line 1: longer than 4194304 letters"),
        (many_rows, r"t\.parquet: 20000000 rows in \d+ bytes; no list of files is that small"),
        (long_values, r"t\.parquet: 512 of its rows take more than 32 MiB without their files; shorten"),
        (long_list, r"t\.parquet: 512 of its rows take more than 32 MiB"),
    ],
)
def test_a_list_that_would_fill_memory_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], Path], sentence: str
) -> None:
    path = make(tmp_path)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=250)
    said, kilobytes = done.stdout.splitlines()
    assert re.search(sentence, said), (said, done.stderr[-2000:])
    assert int(kilobytes) < 1_000_000


def test_long_rows_within_reason_are_read(tmp_path: Path) -> None:
    captions = [f"{n} " + "word " * 1200 for n in range(600)]
    pq.write_table(
        pa.table({"path": [f"{n}.png" for n in range(600)], "caption": captions}), tmp_path / "t.parquet"
    )
    assert [i.captions[0] for i in read_source(str(tmp_path / "t.parquet"))] == [c.strip() for c in captions]
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": "a.png", "captions": ["x" * 1_000_000] * 3}) + "\n")
    assert len(read_source(str(tmp_path / "t.jsonl"))[0].captions) == 3


def test_a_row_group_of_a_hundred_thousand_rows_is_read(tmp_path: Path) -> None:
    names = [f"{n:06}.png" for n in range(100_000)]
    pq.write_table(pa.table({"path": names, "caption": [f"number {n}" for n in names]}), tmp_path / "t.parquet")
    assert len(read_source(str(tmp_path / "t.parquet"))) == 100_000


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_caption_is_no_book(tmp_path: Path, kind: str) -> None:
    caption, path = "x" * ((1 << 20) + 1), tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"path": "a.png", "caption": caption}))
    elif kind == "csv":
        path.write_text(f"path,caption\na.png,{caption}\n")
    else:
        pq.write_table(pa.table({"path": ["a.png"], "caption": [caption]}), path)
    with pytest.raises(DataError, match=r"(line|row) \d: a caption of 1048577 letters; give at most 1048576"):
        read_source(str(path))


def test_of_a_long_caption_behind_a_url_only_the_start_is_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, size in (("long", 20 << 20), ("empty", 0), ("short", 9)):
        (folder / f"{name}.png").write_bytes(b"x")
        (folder / f"{name}.txt").write_text("x" * size)
    with http_server(tmp_path) as server:
        items = read_source(f"{server.url}/set")
        assert [len(i.captions[0]) for i in items] == [0, 1 << 20, 9]
        assert server.sent < 2 << 20
