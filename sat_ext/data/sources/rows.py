"""One row of a table, or one JSON object beside a file, to the fields of an `Item`. Pure."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from sat_ext.data.sources.texts import MAX_CAPTION_BYTES, one_line, parse_json, shown
from sat_ext.errors import DataError

_PATHS = "path file video image file_name video_path image_path url video_file_name image_file_name"
PATH_COLUMNS = tuple(_PATHS.split())
CAPTION_COLUMNS = ("caption", "text", "prompt")
OTHER_COLUMNS = ("captions", "caption_weights", "start", "end", "crop", "fps", "weight")

TableRow = Mapping[str, Any]


def column_of(row: Sequence[str] | TableRow, accepted: Sequence[str], what: str, where: str) -> str:
    """The first accepted column that is there. Raises `DataError`, which lists those that are."""
    for name in accepted:
        if name in row:
            return name
    raise DataError(
        f"{where}: no {what} column among {', '.join(map(repr, row)) or 'none'}; "
        f"name one of them {' or '.join(map(repr, accepted))}."
    )


def require_captions(row: Sequence[str] | TableRow, where: str) -> None:
    """Raise `DataError` if no column can hold captions."""
    if "captions" not in row:
        column_of(row, CAPTION_COLUMNS, "caption", where)


def fields_of(row: TableRow, where: str) -> dict[str, Any]:
    """Keyword arguments of `Item` from a row: `captions` (maybe empty) and what narrows the file down.

    Numbers may be text, and lists JSON in text, as in CSV; None, NaN and empty text mean no value. Raises
    `DataError`, starting with `where`, for an invalid value.

    >>> fields_of({"caption": "A cat.", "start": "1.5", "crop": "[0, 0, 64, 64]", "id": 7}, "t.csv, line 2")
    {'captions': ('A cat.',), 'start': 1.5, 'crop': (0, 0, 64, 64)}
    """
    fields: dict[str, Any] = {"captions": _captions(row, where)}
    if fields["captions"] and (weights := _list(row, "caption_weights", where)) is not None:
        fields["caption_weights"] = _caption_weights(weights, len(fields["captions"]), where)
    for name, what in _NUMBERS.items():
        value = _number(row.get(name))
        if value is None:
            continue
        if not (value > 0 or (value == 0 and name in ("start", "weight"))) or value == math.inf:
            raise DataError(f"{where}: '{name}' is {shown(row[name])}; it must be {what}, or left out.")
        fields[name] = value
    start, end = fields.get("start", 0.0), fields.get("end", math.inf)
    if end <= start:
        raise DataError(f"{where}: 'end' is {end} s, not after its 'start' at {start} s; swap or fix them.")
    if (crop := _list(row, "crop", where)) is not None:
        fields["crop"] = _crop(crop, where)
    return fields


def _captions(row: TableRow, where: str) -> tuple[str, ...]:
    value: Any = _list(row, "captions", where)
    if value is None:
        value = next((row[n] for n in CAPTION_COLUMNS if row.get(n) is not None), [])
    if value != value:  # NaN, which pandas writes for nothing
        return ()
    captions = value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str):
            raise DataError(f"{where}: the caption is {shown(caption)}; it must be a string, or a list of them.")
        if len(caption) > MAX_CAPTION_BYTES:
            raise DataError(f"{where}: a caption of {len(caption)} letters; give at most {MAX_CAPTION_BYTES}.")
    return tuple(map(one_line, captions))


def _caption_weights(weights: list[Any], captions: int, where: str) -> tuple[float, ...]:
    numbers = [_number(w) for w in weights]
    if len(numbers) != captions:
        raise DataError(f"{where}: {len(numbers)} caption_weights for {captions} captions; give one for each.")
    known = [n for n in numbers if n is not None and 0 <= n < math.inf]
    if len(known) < len(numbers) or not 0 < sum(known) < math.inf:
        raise DataError(
            f"{where}: 'caption_weights' is {shown(weights)}; they must be numbers, 0 or more, not all 0, with a "
            "finite sum."
        )
    return tuple(known)


def _crop(crop: list[Any], where: str) -> tuple[int, int, int, int]:
    numbers = [_number(c) for c in crop]
    whole = [int(n) for n in numbers if n is not None and n == n // 1]
    if len(crop) != 4 or len(whole) != 4 or min(whole[:2]) < 0 or min(whole[2:]) < 1 or max(whole) >= 1 << 31:
        raise DataError(
            f"{where}: 'crop' is {shown(crop)}; it must be [left, top, width, height] in whole pixels inside the "
            "frame."
        )
    left, top, width, height = whole
    return left, top, width, height


def _number(value: Any) -> float | None:
    """None if there is no value; NaN, which passes no check, if it is not a number."""
    if _is_nothing(value) or (isinstance(value, str) and value.strip().lower() == "nan"):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _list(row: TableRow, name: str, where: str) -> list[Any] | None:
    value = row.get(name)
    if _is_nothing(value):
        return None
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise DataError(f"{where}: '{name}' is {shown(row[name])}; it must be a list, such as {_EXAMPLES[name]}.")
    return value


def _is_nothing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


_NUMBERS = {
    "start": "seconds, 0 or more",
    "end": "seconds above 0",
    "fps": "frames a second above 0",
    "weight": "0 or more",
}
_EXAMPLES = {
    "captions": '["A cat.", "A black cat on a mat."]',
    "caption_weights": "[3, 1]",
    "crop": "[left, top, width, height]",
}
