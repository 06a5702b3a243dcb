from __future__ import annotations

import csv
import io
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sat_ext.data.probe import probe
from sat_ext.data.sources import read_source
from sat_ext.errors import DataError
from sat_ext.files import suffix_of
from sat_ext.types import Item
from tests.media import pattern, write_clip

ROWS: list[dict[str, Any]] = [
    {"path": "a.mp4", "caption": "plain"},
    {"path": "b.mp4", "caption": ["one", "two"]},
    {"path": "c.mp4", "captions": ["x", "y"], "caption_weights": [3, 1], "caption": "not this"},
    {
        "path": "d.mp4",
        "caption": "part",
        "start": 1.5,
        "end": 4,
        "crop": [0, 10, 64, 48],
        "weight": 2,
        "fps": 30.0,
    },
    {"path": "e.mp4", "caption": "nothing more", "start": None, "end": None, "crop": None, "captions": None},
]


def items_of(folder: Path) -> list[Item]:
    path = lambda name: str(folder / name)  # noqa: E731
    return [
        Item(path=path("a.mp4"), key="a.mp4", captions=("plain",)),
        Item(path=path("b.mp4"), key="b.mp4", captions=("one", "two")),
        Item(path=path("c.mp4"), key="c.mp4", captions=("x", "y"), caption_weights=(3.0, 1.0)),
        Item(
            path=path("d.mp4"),
            key="d.mp4",
            captions=("part",),
            start=1.5,
            end=4.0,
            crop=(0, 10, 64, 48),
            weight=2.0,
            fps=30.0,
        ),
        Item(path=path("e.mp4"), key="e.mp4", captions=("nothing more",)),
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_jsonl_rows_say_what_part_of_a_file_is_meant(tmp_path):
    assert read_source(write_jsonl(tmp_path / "t.jsonl", ROWS)) == items_of(tmp_path)


def test_csv_rows_do_so_with_lists_as_json(tmp_path):
    text = io.StringIO()
    names = ["path", "caption", "captions", "caption_weights", "start", "end", "crop", "weight", "fps", "other"]
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    for row in ROWS:
        cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
        if isinstance(row.get("caption"), list):  # a plain caption is text in a CSV, whatever it looks like
            cells = {"path": row["path"], "captions": cells["caption"]}
        writer.writerow(cells | {"other": "ignored"})
    (tmp_path / "t.csv").write_text(text.getvalue())
    assert read_source(str(tmp_path / "t.csv")) == items_of(tmp_path)


def test_parquet_rows_do_so_with_nulls_for_nothing(tmp_path):
    rows = [
        {**dict.fromkeys(("captions", "caption_weights", "start", "end", "crop", "weight", "fps")), **r}
        for r in ROWS
    ]
    for row in rows:
        if isinstance(row["caption"], list):
            row["captions"], row["caption"] = row["caption"], None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    assert read_source(str(tmp_path / "t.parquet")) == items_of(tmp_path)


def test_a_caption_in_a_csv_may_look_like_a_list(tmp_path):
    (tmp_path / "t.csv").write_text('path,caption\na.mp4,"[a cat, on a mat]"\n')
    assert read_source(str(tmp_path / "t.csv"))[0].captions == ("[a cat, on a mat]",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": -1}, r"'start' is -1; it must be seconds, 0 or more, or left out"),
        ({"start": "soon"}, r"'start' is 'soon'; it must be seconds"),
        ({"end": 0}, r"'end' is 0; it must be seconds above 0"),
        ({"end": True}, r"'end' is True; it must be seconds above 0"),
        ({"start": 5, "end": 5}, r"'end' is 5\.0 s, not after its 'start' at 5\.0 s; swap or fix them"),
        ({"fps": 0}, r"'fps' is 0; it must be frames a second above 0"),
        ({"weight": -2}, r"'weight' is -2; it must be 0 or more"),
        ({"weight": 1e999}, r"'weight' is inf; it must be 0 or more"),
        ({"crop": [0, 0, 64]}, r"'crop' is \[0, 0, 64\]; it must be \[left, top, width, height\] in whole pixels"),
        ({"crop": [0, 0, 64, 0]}, r"'crop' is \[0, 0, 64, 0\]"),
        ({"crop": [0, 0.5, 64, 64]}, r"'crop' is \[0, 0\.5, 64, 64\]"),
        ({"crop": "centre"}, r"'crop' is 'centre'; it must be a list, such as \[left, top, width, height\]"),
        ({"caption": ["a", 3]}, r"the caption is 3; it must be a string, or a list of them"),
        ({"captions": "a"}, r"""'captions' is 'a'; it must be a list, such as \["A cat\.", """),
        ({"caption": ["a", "b"], "caption_weights": [1]}, r"1 caption_weights for 2 captions; give one for each"),
        (
            {"caption": ["a"], "caption_weights": [0]},
            r"'caption_weights' is \[0\]; they must be numbers, 0 or more",
        ),
        ({"caption": ["a"], "caption_weights": [-1]}, r"'caption_weights' is \[-1\]"),
        ({"caption": ["a", "b"], "caption_weights": [1e308, 1e308]}, r"'caption_weights' is .* with a finite sum"),
        ({"crop": [0, 0, 10**30, 64]}, r"'crop' is \[0, 0, 1000.*in whole pixels"),
        ({"path": "lone \ud800 half.mp4"}, r"'path' is .*; it must be the path of a media file"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named_with_its_line(tmp_path, fields, message):
    rows = [{"path": "a.mp4", "caption": "fine"}, {"path": "b.mp4", "caption": "x"} | fields]
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: " + message):
        read_source(write_jsonl(tmp_path / "t.jsonl", rows))


def test_a_caption_with_half_a_surrogate_can_be_written_down(tmp_path):
    (item,) = read_source(write_jsonl(tmp_path / "t.jsonl", [{"path": "a.mp4", "caption": "cat \ud83d"}]))
    assert item.captions == ("cat ?",) and item.captions[0].encode()


def test_not_a_number_is_no_value(tmp_path):
    row = {"path": "a.mp4", "caption": "x", "start": float("nan"), "end": "", "crop": "", "weight": "nan"}
    (item,) = read_source(write_jsonl(tmp_path / "t.jsonl", [row]))
    assert item == Item(path=str(tmp_path / "a.mp4"), key="a.mp4", captions=("x",))


def test_empty_lists_and_nan_are_no_caption(tmp_path):
    rows = [{"path": "a", "caption": []}, {"path": "b", "caption": float("nan")}, {"path": "c", "captions": []}]
    with pytest.raises(DataError, match=r"3 of 3 rows have no caption \(line 1, line 2, line 3\); fill them in"):
        read_source(write_jsonl(tmp_path / "t.jsonl", rows))


def test_rows_may_be_urls(tmp_path):
    rows = [{"url": u, "text": "x"} for u in ("s3://b/a.mp4", "https://h/b.mp4?x=1")]
    items = read_source(write_jsonl(tmp_path / "t.jsonl", rows))
    assert [i.path for i in items] == ["https://h/b.mp4?x=1", "s3://b/a.mp4"]


def embedded(tmp_path: Path, *, struct: bool, names: bool) -> tuple[str, list[Path]]:
    files = [write_clip(tmp_path / "a.mp4"), write_clip(tmp_path / "b.webm", codec="libvpx-vp9")]
    column: list[Any] = [f.read_bytes() for f in files]
    if struct:
        column = [{"bytes": b, "path": f.name if names else None} for b, f in zip(column, files, strict=True)]
    table = pa.table({"video": column, "caption": ["first", "second"], "start": [0.5, None], "n": [1, 2]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    return str(tmp_path / "t.parquet"), files


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("names", [True, False])
def test_files_in_a_tables_cells_are_items_and_can_be_opened(tmp_path, struct, names):
    table, files = embedded(tmp_path, struct=struct, names=names)
    items = read_source(table)
    assert [(i.key, i.captions, i.start) for i in items] == [
        ("t.parquet#0", ("first",), 0.5),
        ("t.parquet#1", ("second",), 0.0),
    ]
    assert suffix_of(items[1].path) == (".webm" if struct and names else ".mp4")  # else as the first one starts
    assert [probe(i.path) for i in items] == [probe(str(f)) for f in files]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".tiff", ".bmp", ".avif"])
def test_stills_without_a_name_are_known_by_how_they_start(tmp_path, suffix):
    Image.fromarray(pattern(1)).save(tmp_path / f"a{suffix}")
    cell = {"bytes": (tmp_path / f"a{suffix}").read_bytes(), "path": None}
    pq.write_table(pa.table({"image": [cell], "text": ["x"]}), tmp_path / "t.parquet")
    (item,) = read_source(str(tmp_path / "t.parquet"))
    assert suffix_of(item.path) == suffix and probe(item.path).frames == 1


def test_listing_a_table_does_not_read_the_files_in_it(tmp_path):
    column = pa.array([os.urandom(1 << 20) for _ in range(60)])
    table = pa.table({"jpg": column, "caption": ["x"] * 60})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=60, use_dictionary=False, write_batch_size=1)
    del column, table
    default, pool = pa.default_memory_pool(), pa.system_memory_pool()  # another pool, as its peak is counted again
    pa.set_memory_pool(pool)
    try:
        assert len(read_source(str(tmp_path / "t.parquet"))) == 60
    finally:
        pa.set_memory_pool(default)
    assert (pool.max_memory() or 0) < 20 << 20


def test_a_parquet_file_that_cannot_be_used_says_why(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(DataError, match=r"t\.parquet: not a readable Parquet file \(.*\); write it again"):
        read_source(str(path))
    pq.write_table(pa.table({"path": ["a.mp4"]}), path)
    with pytest.raises(DataError, match=r"no caption column among 'path'; name one of them 'caption'"):
        read_source(str(path))
    pq.write_table(pa.table({"id": [1], "caption": ["x"]}), path)
    with pytest.raises(DataError, match=r"no path column among 'id', 'caption'"):
        read_source(str(path))
    pq.write_table(pa.table({"path": ["a.mp4"], "caption": ["x"], "weight": [-1]}), path)
    with pytest.raises(DataError, match=r"t\.parquet, row 0: 'weight' is -1; it must be 0 or more"):
        read_source(str(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"path": "a.mp4", "caption": "x", "start": 1' + "0" * 5000 + "}", "line 1: not JSON"),
        (
            '{"path": "a.mp4", "caption": "x", "start": 1' + "0" * 400 + "}",
            "'start' is 1000.*; it must be seconds",
        ),
        ('{"path": "a.mp4", "caption": "x", "crop": "[1' + "0" * 5000 + ']"}', "'crop' is .*; it must be a list"),
        ('{"path": "a.mp4", "caption": [' + "1, " * 5000 + "2]}", "the caption is 1; it must be a string"),
        ('{"path": [' + '"x", ' * 5000 + '"y"], "caption": "x"}', "'path' is .*; it must be the path"),
    ],
)
def test_a_value_beyond_all_bounds_is_one_short_sentence(tmp_path, row, message):
    (tmp_path / "t.jsonl").write_text(row)
    with pytest.raises(DataError, match=message) as error:
        read_source(str(tmp_path / "t.jsonl"))
    assert len(str(error.value)) < len(str(tmp_path)) + 400


def test_decimals_are_numbers(tmp_path):
    table = pa.table({"path": ["a.mp4"], "caption": ["x"], "start": pa.array([Decimal("1.5")])})
    pq.write_table(table, tmp_path / "t.parquet")
    assert read_source(str(tmp_path / "t.parquet"))[0].start == 1.5


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet", "a.txt"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    (tmp_path / "a.png").touch()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{re.escape(name)}: not a regular file"):
        read_source(str(tmp_path if name == "a.txt" else tmp_path / name))
