"""Folders and tables to a list of items: paths and captions, no media file is opened."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sat_ext.errors import ConfigError, DataError
from sat_ext.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Item

PATH_COLUMNS = ("path", "file", "video", "image", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt")

# CogVideo's layout: videos/x.mp4 has its caption in labels/x.txt.
_LABELLED_FOLDERS = frozenset({"videos", "images"})

_LISTED = 3  # how many examples an error names


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One entry of `data.params.sources`.

    `path` is a folder, a .jsonl or a .csv file; `name` is for logs and the batch, None for the path's own;
    `share` is the part of the samples that come from it, relative to the other sources' shares; `sampler`
    names what a clip gives.
    """

    path: str
    name: str | None = None
    share: float | None = None
    sampler: Literal["start", "random_start", "middle", "uniform", "first_frame", "random_frame"] = "random_start"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("sources: a path is empty; give a folder, a .jsonl or a .csv file.")
        if self.share is not None and not 0 < self.share < float("inf"):
            raise ConfigError(f"sources: share {self.share} of '{self.path}' must be a number above 0.")


def read_source(path: str) -> list[Item]:
    """Every item of a folder (searched through all levels, links followed), a .jsonl or a .csv file.

    Items come in natural order of their keys (clip2 before clip10), whatever the file system's order is.
    Raises `DataError` when there is nothing to read, or not a caption for every file.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        items = _read_folder(root)
    elif not root.exists():
        raise DataError(f"{path}: no such file or folder; check sources or train_data.")
    elif root.suffix.lower() in _TABLES:
        items = _read_table(root)
    else:
        raise DataError(
            f"{path}: '{root.suffix}' is not a kind of source; give a folder, or a table {' or '.join(_TABLES)}."
        )
    return sorted(items, key=lambda item: _natural(item.key))


def _natural(key: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts numbers inside names by value; the plain key last, so that the order is total."""
    parts = re.split(r"([0-9]{1,18})", key.casefold())
    return [(int(p), "") if i % 2 else (-1, p) for i, p in enumerate(parts)], key


def _read_folder(root: Path) -> list[Item]:
    items: list[Item] = []
    bare: list[Path] = []  # files without a caption
    for file in _media_files(root):
        sidecar = next((c for c in _caption_files(file) if c.is_file()), None)
        if sidecar is None:
            bare.append(file)
        else:
            key = file.relative_to(root).as_posix()
            items.append(Item(path=str(file), caption=_caption(sidecar), key=key))
    if bare:
        bare.sort(key=lambda file: _natural(str(file)))
        looked = " and ".join(f"'{c}'" for c in _caption_files(bare[0]))
        names = ", ".join(f"'{f.relative_to(root).as_posix()}'" for f in bare[:_LISTED])
        more = ", ..." if len(bare) > _LISTED else ""
        raise DataError(
            f"{root}: {len(bare)} of {len(items) + len(bare)} media files have no caption ({names}{more}; "
            f"looked for {looked}); write one text file for each, or list the files in a .jsonl or .csv."
        )
    if not items:
        raise DataError(
            f"{root}: no image or video in this folder or below it; "
            f"known are {' '.join(sorted(IMAGE_EXTENSIONS | VIDEO_EXTENSIONS))}."
        )
    return items


def _media_files(root: Path) -> Iterator[Path]:
    """Media under `root`. A folder that links lead to more than once is read once, so loops of links end."""
    seen = {os.path.realpath(root)}
    for folder, below, names in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        below[:] = kept
        for name in names:
            # A leading dot marks what tools leave beside the files, such as macOS's '._clip.mp4'.
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in IMAGE_EXTENSIONS | VIDEO_EXTENSIONS:
                yield Path(folder, name)


def _caption_files(media: Path) -> list[Path]:
    """Where the caption of `media` may be, best first."""
    beside = media.with_suffix(".txt")
    parts = list(beside.absolute().parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] in _LABELLED_FOLDERS:
            return [beside, Path(*parts[:i], "labels", *parts[i + 1 :])]
    return [beside]


def _caption(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: byte {error.start} is not UTF-8; save the caption as UTF-8.") from None
    return _one_line(text)


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _read_table(table: Path) -> list[Item]:
    folder = table.parent
    items: list[Item] = []
    bare: list[int] = []
    uses: Counter[str] = Counter()
    for line, row in _TABLES[table.suffix.lower()](table):
        where = f"{table}, line {line}"
        path_column = _column(row, PATH_COLUMNS, "path", where)
        file = row[path_column]
        if not isinstance(file, str) or not file:
            raise DataError(f"{where}: '{path_column}' is {file!r}; it must be the path of a media file.")
        caption = row[_column(row, CAPTION_COLUMNS, "caption", where)]
        if caption is None:
            bare.append(line)
            continue
        if not isinstance(caption, str):
            raise DataError(f"{where}: the caption is {caption!r}; it must be a string.")
        uses[file] += 1
        # The same file may be listed with several captions: its further uses get keys of their own.
        key = file if uses[file] == 1 else f"{file}#{uses[file]}"
        items.append(Item(path=str(folder / file), caption=_one_line(caption), key=key))
    if bare:
        lines = ", ".join(map(str, bare[:_LISTED])) + (", ..." if len(bare) > _LISTED else "")
        raise DataError(
            f"{table}: {len(bare)} of {len(items) + len(bare)} rows have no caption (line {lines}); "
            "fill them in or remove the rows."
        )
    if not items:
        raise DataError(f"{table}: no rows; every row names one media file and its caption.")
    return items


def _column(row: dict[str, Any], accepted: Sequence[str], what: str, where: str) -> str:
    for name in accepted:
        if name in row:
            return name
    raise DataError(
        f"{where}: no {what} column among {', '.join(map(repr, row)) or 'none'}; "
        f"name one of them {' or '.join(map(repr, accepted))}."
    )


def _jsonl_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row. A blank line is no row."""
    for number, line in enumerate(_lines(table), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{table}, line {number}: not JSON ({error}); write one object a line, such as "
                '{"path": "a.mp4", "caption": "A cat."}.'
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{table}, line {number}: a JSON {type(row).__name__}; write one object a line.")
        yield number, row


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and row, from a comma-separated file with a header."""
    reader = csv.reader(_lines(table), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if header:
            columns: dict[str, Any] = dict.fromkeys(header)
            _column(columns, PATH_COLUMNS, "path", f"{table}, line 1")
            _column(columns, CAPTION_COLUMNS, "caption", f"{table}, line 1")
        for cells in reader:
            if not cells:
                continue
            if len(cells) > len(header):
                raise DataError(
                    f"{table}, line {reader.line_num}: {len(cells)} cells under {len(header)} columns; "
                    "put quotes around a caption that holds commas."
                )
            yield reader.line_num, dict.fromkeys(header) | dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise DataError(f"{table}, line {reader.line_num}: not CSV ({error}); mend the quotes.") from None


def _lines(table: Path) -> Iterator[str]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"{table}: not UTF-8 ({error.reason}); save the table as UTF-8.") from None


_TABLES = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
