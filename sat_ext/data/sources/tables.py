"""JSONL, CSV and Parquet tables: a row names a file, or holds it, and says how to use it."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sat_ext.data.columns import ROWS, item_batches
from sat_ext.data.guard import Guard
from sat_ext.data.sources.arrow import plain_items, plain_objects, with_unique_keys
from sat_ext.data.sources.listing import Notes, is_media
from sat_ext.data.sources.reach import Reach, folder_of, resolve
from sat_ext.data.sources.rows import (
    CAPTION_COLUMNS,
    OTHER_COLUMNS,
    PATH_COLUMNS,
    column_of,
    fields_of,
    require_captions,
)
from sat_ext.data.sources.texts import (
    LONGEST_LINE,
    blocks_of,
    is_text,
    lines_in,
    lines_of,
    objects_of,
    open_text,
    shown,
)
from sat_ext.errors import DataError, MediaError
from sat_ext.files import is_url, suffix_of
from sat_ext.files.cells import Cells
from sat_ext.files.locations import cell_location
from sat_ext.media import image_formats
from sat_ext.types import Item

_ROWS_AT_ONCE = 512
_LARGEST_BATCH = 32 << 20  # bytes of so many rows: 64 KiB each, or a few of the longest captions
# Bytes and seconds for a Parquet table in its guard. Arrow's pool (mimalloc) reserves one GiB at once.
_MEMORY, _TIMEOUT = 3 << 29, 3600.0
_READ_BYTES = 1 << 20  # of a column; without it, Arrow reads all files of a row group to find how the first starts


def read_tables(tables: Sequence[tuple[str, str]], notes: Notes) -> Iterator[pa.RecordBatch]:
    """The rows of .jsonl, .csv and .parquet files, each given as its location and a prefix for its rows' keys.

    Raises `DataError` for a table or a value in it that cannot be used, and if rows have no caption.
    """
    for table, prefix in tables:
        yield from collect(TABLES[suffix_of(table)](table, notes.reach), table, prefix, notes)


# The place of a row in words, its key, the location of its file, and the other fields of its `Item`.
ReadRow = tuple[str, str, str, dict[str, Any]]
# A row, or many of them as `ITEM_COLUMNS`.
ReadRows = Iterable["ReadRow | pa.RecordBatch"]


def collect(
    rows: Iterable[ReadRow | pa.RecordBatch], table: str, prefix: str, notes: Notes
) -> list[pa.RecordBatch]:
    """The items of a table's rows, with `prefix` before their keys."""
    bare: list[str] = []

    def items(group: Iterable[Any]) -> Iterator[Item]:
        for place, key, path, fields in group:
            if not fields["captions"]:
                bare.append(place)
            yield Item(path=path, key=key, **fields)

    batches: list[pa.RecordBatch] = []
    for are_items, group in groupby(rows, key=lambda row: isinstance(row, pa.RecordBatch)):
        found: Any = group
        batches += found if are_items else item_batches(items(found))
    if bare and notes.captions_required:
        raise DataError(
            f"{table}: {len(bare)} of {sum(batch.num_rows for batch in batches)} rows have no caption "
            f"({', '.join(bare[:3])}{', ...' * (len(bare) > 3)}); fill them in or remove the rows."
        )
    if not batches:
        raise DataError(f"{table}: no rows; every row names one media file and its caption.")
    return with_unique_keys(batches, prefix)


def _jsonl(table: str, reach: Reach) -> ReadRows:
    base, first = folder_of(table), 1
    for block in blocks_of(table):
        rows = plain_objects(block)
        batch = plain_items(rows, base, reach) if rows is not None else None
        if batch is not None:
            yield batch
            first += batch.num_rows
            continue
        lines = list(lines_in(block, table, first))
        for place, row in objects_of(table, '{"path": "a.mp4", "caption": "A cat."}', lines, first):
            yield _named_file(row, base, place, f"{table}, {place}", reach)
        first += len(lines)


def _csv(table: str, reach: Reach) -> ReadRows:
    base = folder_of(table)
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(lines_of(table), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if header:
            column_of(header, PATH_COLUMNS, "path", f"{table}, line 1")
            require_captions(header, f"{table}, line 1")
        for cells in reader:
            if not cells:
                continue
            place = f"line {reader.line_num}"
            if len(cells) > len(header):
                raise DataError(
                    f"{table}, {place}: {len(cells)} cells under {len(header)} columns; "
                    "put quotes around a caption that holds commas."
                )
            row = dict.fromkeys(header) | dict(zip(header, cells, strict=False))
            yield _named_file(row, base, place, f"{table}, {place}", reach)
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: not CSV ({error}); fix the quotes.") from None


def _named_file(row: dict[str, Any], base: str, place: str, where: str, reach: Reach) -> ReadRow:
    column = column_of(row, PATH_COLUMNS, "path", where)
    file = row[column]
    if not isinstance(file, str) or not file or not is_text(file):
        raise DataError(f"{where}: '{column}' is {shown(file)}; it must be the path of a media file.")
    require_captions(row, where)
    return place, file, resolve(base, file, where, reach), fields_of(row, where)


def _parquet(table: str, reach: Reach) -> ReadRows:
    base, name = folder_of(table), os.path.basename(urlsplit(table).path if is_url(table) else table)
    with _readable(table), Guard(_survey, timeout=_TIMEOUT, memory=_MEMORY) as guard:
        unnamed = guard(table)
    with _readable(table), open_text(table) as file:
        source = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
        wanted, column = _wanted(source, table)
        first = 0
        for batch in _together(_batches(source, wanted)):
            if column is None and (items := plain_items(batch, base, reach)) is not None:
                yield items
            else:
                for number, row in enumerate(batch.to_pylist(), start=first):
                    where = f"{table}, row {number}"
                    if column is None:
                        yield _named_file(row, base, f"row {number}", where, reach)
                        continue
                    inner = (row.get(column) or {}).get("path") or ""
                    suffix = os.path.splitext(inner)[1].lower() if is_media(inner) else unnamed
                    location = cell_location(table, column, number, suffix)
                    yield f"row {number}", f"{name}#{number}", location, fields_of(row, where)
            first += batch.num_rows


def _survey(table: str) -> str:
    """The suffix of the files in its cells that have no name, from the first one's content.

    Decodes all rows once, in a guard, because a kilobyte of Parquet may hold gigabytes of rows, and Arrow
    allocates before it reports how much.
    """
    with _readable(table), open_text(table) as file:
        size = file.seek(0, os.SEEK_END)
        source = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
        wanted, column = _wanted(source, table)
        if (rows := source.metadata.num_rows) > size:
            raise DataError(f"{table}: {rows} rows in {size} bytes; no list of files is that small.")
        for batch in _batches(source, wanted):
            if batch.nbytes > _LARGEST_BATCH:
                raise MemoryError
        if column is None or not rows:
            return ""
        return _suffix_by_content(Cells(file, column).read(0) or b"")


@contextmanager
def _readable(table: str) -> Iterator[None]:
    """Raises errors of Arrow and the guard as `DataError`."""
    try:
        yield
    except MemoryError as error:
        raise DataError(
            f"{table}: {_ROWS_AT_ONCE} of its rows take more than {_LARGEST_BATCH >> 20} MiB without their files; "
            "shorten their values."
        ) from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: not a readable Parquet file ({error}); write it again.") from error
    except MediaError as error:
        raise DataError(f"{table}: {error.reason}; check sources or train_data.") from error


def _wanted(source: pq.ParquetFile, table: str) -> tuple[list[str], str | None]:
    """The columns to read, and the one that holds whole files."""
    names = source.schema_arrow.names
    require_captions(names, table)
    wanted = [c for c in (*CAPTION_COLUMNS, *OTHER_COLUMNS) if c in names]
    column = embedded_column(source.schema_arrow)
    if column is None:
        wanted.append(column_of(names, PATH_COLUMNS, "path", table))
    elif pa.types.is_struct(source.schema_arrow.field(column).type):
        wanted.append(f"{column}.path")
    return wanted, column


def _batches(source: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Without dictionaries, in which a kilobyte may stand for gigabytes."""
    for batch in source.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns, use_threads=False):
        plain = [c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for c in batch.columns]
        yield pa.record_batch(plain, names=batch.schema.names)


def _together(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """As many rows as a batch of items has, or a few of the longest: small batches take longer."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(b.num_rows for b in held) >= ROWS or sum(b.nbytes for b in held) >= _LARGEST_BATCH:
            yield from pa.Table.from_batches(held).combine_chunks().to_batches()
            held = []
    yield from pa.Table.from_batches(held).combine_chunks().to_batches() if held else ()


def embedded_column(schema: pa.Schema) -> str | None:
    """The column that holds whole files: binary, or Hugging Face's struct of bytes and path. Clips win."""

    def holds_files(field: pa.Field) -> bool:
        if pa.types.is_struct(field.type):
            return {"bytes", "path"} <= {f.name for f in field.type}
        binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        return binary and (field.name in ("video", "image", "bytes", "content") or field.name in _PLAIN_NAMES)

    found = [field.name for field in schema if holds_files(field)]
    return min(found, key=lambda name: ("video" not in name and name != "mp4", found.index(name)), default=None)


_PLAIN_NAMES = frozenset({"mp4", "webm", "jpg", "jpeg", "png", "webp", "gif"})  # img2dataset's and video2dataset's


def _suffix_by_content(data: bytes) -> str:
    if data[4:8] == b"ftyp" and data[8:11] != b"avi":  # AVIF is MP4's container too
        return ".mp4"
    if data.startswith(b"\x1aE\xdf\xa3"):
        return ".mkv"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return ".avi"
    with suppress(Exception), Image.open(io.BytesIO(data), formats=image_formats()) as image:
        return {"JPEG": ".jpg"}.get(str(image.format), f".{image.format}".lower())
    return ".jpg"


TABLES: dict[str, Callable[..., ReadRows]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
