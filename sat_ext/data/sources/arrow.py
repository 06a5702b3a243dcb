"""Rows of tables to items, and items into their order, a batch at a time: no Python object for each."""

import io
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from sat_ext.data.columns import ITEM_COLUMNS, ROWS
from sat_ext.data.sources.reach import Reach
from sat_ext.data.sources.rows import CAPTION_COLUMNS, PATH_COLUMNS
from sat_ext.data.sources.texts import MAX_CAPTION_BYTES, one_line
from sat_ext.files import is_url

_LISTS = ("captions", "caption_weights", "crop")
_NUMBERS = ("start", "end", "fps", "weight")
_OBJECTS = pa.schema(
    [(name, pa.string()) for name in (*PATH_COLUMNS, *CAPTION_COLUMNS)]
    + [(name, pa.float64()) for name in _NUMBERS]
    + [(name, pa.null()) for name in _LISTS]
)
# Names that are the same on every system, and whose last part is a file's: ASCII without `#`, `:` and backslashes.
_LOCAL = r'^(?:[!"$-9;-\[\]-~][ !"$-9;-\[\]-~]*/|/)?[!"$--0-9;-\[\]-~](?:[ !"$-.0-9;-\[\]-~]*[!"$-.0-9;-\[\]-~])?$'
_ODD = ("null", "Inf", "NaN")
_ODD_VALUE = r"[:,\[]\s*-?(null|Inf|Infinity|NaN)\s*[,}\]]"
_SPACE = r"[\x00-\x20\x7f-\x{a0}\x{1680}\x{2000}-\x{206f}\x{3000}]"  # or what may be one
_SEVERAL_LINES = rf"[\r\n]|^{_SPACE}|{_SPACE}$"


def plain_objects(text: str) -> pa.RecordBatch | None:
    """The objects of lines of JSONL; None unless all can be read alike by any parser of JSON."""
    text = text.replace("\r\n", "\n").removesuffix("\n") + "\n"
    count = text.count("\n")
    if "\r" in text or not text.startswith("{") + text.count("\n{") == text.count("}\n") == count:
        return None
    # `null` is not the same as nothing, and Arrow knows numbers that JSON does not
    if any(word in text for word in _ODD) and re.search(_ODD_VALUE, text):
        return None
    data = text.encode()
    options = pa.json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    parsing = pa.json.ParseOptions(explicit_schema=_OBJECTS, unexpected_field_behavior="ignore")
    try:
        table = pa.json.read_json(io.BytesIO(data), options, parsing).combine_chunks()
        table.validate(full=True)
    except pa.ArrowException:
        return None
    return table.to_batches()[0] if table.num_rows == count else None


def plain_items(rows: pa.RecordBatch, base: str, reach: Reach) -> pa.RecordBatch | None:
    """The items (`ITEM_COLUMNS`) of rows with a path, a caption and nothing but valid numbers beside.

    None for any others, which go row by row: what is read there, or said to be wrong, is the same.
    """
    columns = dict(zip(rows.schema.names, rows.columns))
    names, captions = (
        [columns[name].cast(pa.string()) for name in wanted if name in columns and _is_text(columns[name])]
        for wanted in (PATH_COLUMNS, CAPTION_COLUMNS)
    )
    others = [columns[name] for name in (*_LISTS, *PATH_COLUMNS, *CAPTION_COLUMNS) if name in columns]
    if not names or not captions or any(not _is_text(c) and c.null_count < len(c) for c in others):
        return None
    name, caption = pc.coalesce(*names), pc.coalesce(*captions)
    numbers = _numbers(columns)
    if name.null_count or caption.null_count or numbers is None or is_url(base) or "#" in base:
        return None
    remote = pc.match_substring_regex(name, rf"^(?i:{'|'.join(sorted(reach.protocols))})://[^#]*$")
    if not pc.all(pc.or_(remote, pc.match_substring_regex(name, _LOCAL))).as_py():
        return None
    inside = pc.invert(pc.or_(remote, pc.starts_with(name, "/")))
    folder = base if base.endswith("/") else f"{base}/"
    path = pc.if_else(inside, pc.binary_join_element_wise(folder, name, ""), name)
    if pc.max(pc.binary_length(caption)).as_py() > MAX_CAPTION_BYTES:
        return None
    if not reach.holds(path.filter(pc.invert(remote))):
        return None
    spread = pc.match_substring_regex(caption, _SEVERAL_LINES)
    if pc.any(spread).as_py():
        lines = map(one_line, caption.filter(spread).to_pylist())
        caption = pc.replace_with_mask(caption, spread, pa.array(lines, pa.string()))
    return items_of(path, name, caption, numbers)


def items_of(
    path: pa.Array, key: pa.Array, caption: pa.Array, numbers: Sequence[pa.Array | None] = (None,) * 4
) -> pa.RecordBatch:
    """`ITEM_COLUMNS` with one caption each, none where it is null. `numbers` are start, end, fps and weight."""
    *defaults, no_weights, no_crop = _defaults(len(path))
    start, end, fps, weight = (default if own is None else own for own, default in zip(numbers, defaults))
    ends = np.append(np.int32(0), np.cumsum(caption.is_valid().to_numpy(False), dtype=np.int32))
    captions = pa.ListArray.from_arrays(pa.array(ends), caption.drop_null())
    return pa.record_batch(
        [path, key, captions, no_weights, start, end, no_crop, fps, weight], schema=ITEM_COLUMNS
    )


@lru_cache(maxsize=64)  # of many batches of one size these columns are the same memory
def _defaults(count: int) -> tuple[pa.Array, ...]:
    """Start, end, fps and weight, caption weights and crop of rows that have none."""
    nothing = pa.nulls(count, pa.float64())
    no_weights = pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.float64()))
    start, weight = (pa.array(np.full(count, value)) for value in (0.0, 1.0))
    return start, nothing, nothing, weight, no_weights, pa.nulls(count, pa.list_(pa.int32()))


def _is_text(column: pa.Array) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _numbers(columns: dict[str, pa.Array]) -> list[pa.Array | None] | None:
    """Start, end, fps and weight, None for a column without values; None if a value is not valid."""
    found: list[pa.Array | None] = []
    for name in _NUMBERS:
        column = columns.get(name)
        if column is None or column.null_count == len(column):
            found.append(None)
            continue
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            return None
        column = column.cast(pa.float64(), safe=False)
        column = pc.if_else(pc.is_nan(column), None, column)
        least = pc.greater_equal if name in ("start", "weight") else pc.greater
        if pc.any(pc.invert(pc.and_(least(column, 0.0), pc.less(column, np.inf)))).as_py():
            return None
        default = {"start": 0.0, "weight": 1.0}.get(name)
        found.append(column if default is None else column.fill_null(default))
    start, end = found[:2]
    is_empty = end is not None and pc.any(pc.less_equal(end, 0.0 if start is None else start)).as_py()
    return None if is_empty else found


def with_unique_keys(batches: Sequence[pa.RecordBatch], prefix: str) -> list[pa.RecordBatch]:
    """`prefix` before each key, and `#2` after a key that comes again: a file may have several rows."""
    if (in_order := _rise([batch["key"] for batch in batches])) and not prefix:
        return list(batches)
    keys = pa.chunked_array([batch["key"] for batch in batches]).cast(pa.large_string())
    use = np.zeros(len(keys), np.int64)
    # a dictionary takes three times as much memory as the keys
    codes = None if in_order else keys.combine_chunks().dictionary_encode()
    if codes is not None and len(codes.dictionary) < len(keys):
        numbers = codes.indices.to_numpy()
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        use[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    elif not prefix:
        return list(batches)
    found, first = [], 0
    for batch in batches:
        key, of = batch["key"], use[first : first + batch.num_rows]
        if of.any():
            again = pc.binary_join_element_wise(key, pa.array(of + 1).cast(pa.string()), "#")
            key = pc.if_else(pa.array(of > 0), again, key)
        key = pc.binary_join_element_wise(prefix, key, "")
        found.append(batch.set_column(1, ITEM_COLUMNS.field("key"), key))
        first += batch.num_rows
    return found


def _rise(columns: Iterable[pa.Array]) -> bool:
    """Whether each text comes after the one before it, so that none comes twice."""
    last = ""
    for texts in columns:
        if texts[0].as_py() <= last or not pc.all(pc.less(texts[:-1], texts[1:])).as_py():
            return False
        last = texts[-1].as_py()
    return True


def in_natural_order(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """The items by the numbers inside their keys, then by case; `batches` is emptied, as memory holds it once."""
    if _rise(_natural(batch["key"]) for batch in batches):
        return batches
    table = pa.Table.from_batches(batches, ITEM_COLUMNS)
    batches.clear()
    keys = [pa.chunked_array([_natural(c) for c in table["key"].chunks]), table["key"]]
    by = pa.table(keys, names=["natural", "plain"])
    order = pc.sort_indices(by, sort_keys=[("natural", "ascending"), ("plain", "ascending")])
    del by, keys
    columns = []
    for field in ITEM_COLUMNS:  # one by one, for they may be large
        columns.append(table[field.name].cast(_large(field.type)).combine_chunks().take(order))
        table = table.drop_columns([field.name])
    return [
        pa.record_batch(
            [c.slice(first, ROWS).cast(field.type) for c, field in zip(columns, ITEM_COLUMNS)], schema=ITEM_COLUMNS
        )
        for first in range(0, len(order), ROWS)
    ]


def _large(kind: pa.DataType) -> pa.DataType:
    """Without Arrow's limit of 2 GiB to a column."""
    if pa.types.is_list(kind):
        return pa.large_list(_large(kind.value_type))
    return pa.large_string() if pa.types.is_string(kind) else kind


def _natural(keys: pa.Array) -> pa.Array:
    """Keys to sort by: without case, and each number in 18 digits."""
    if pc.all(pc.string_is_ascii(keys)).as_py():
        keys = pc.ascii_lower(keys)
    else:
        keys = pa.array([key.casefold() for key in keys.to_pylist()], pa.string())
    offsets = np.frombuffer(keys.buffers()[1], np.int32)[keys.offset : keys.offset + len(keys) + 1]
    data = np.frombuffer(keys.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    digit = (data >= ord("0")) & (data <= ord("9"))
    begins = digit.copy()
    begins[1:] &= ~digit[:-1]
    begins[offsets[:-1]] = digit[offsets[:-1]]  # a number ends with its key
    starts = np.flatnonzero(begins)
    zeros = np.zeros(len(data) + 1, np.int64)  # to put before each letter
    if len(starts):
        zeros[starts] = np.maximum(0, 18 - np.add.reduceat(digit.astype(np.int64), starts))
    moved = np.cumsum(zeros)
    padded = np.full(len(data) + moved[-1], ord("0"), np.uint8)
    padded[np.arange(len(data)) + moved[:-1]] = data
    ends = (offsets + moved[offsets] - zeros[offsets]).astype(np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(ends), pa.py_buffer(padded))
