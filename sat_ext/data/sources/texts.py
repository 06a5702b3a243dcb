"""The text of captions, tables and lists, and the comparison of names from different systems."""

import codecs
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from sat_ext.errors import DataError, MediaError
from sat_ext.files import is_url, open_binary

# Captions are cut there. No text encoder reads a hundredth of it, and a video named .txt must not fill memory.
MAX_CAPTION_BYTES = 1 << 20
# In letters; Python's own limit for a cell of CSV is 128 KiB. Parsed JSON takes up to 20 times as much.
LONGEST_LINE = 4 << 20

_BLOCK = 1 << 19  # letters, and the rest of a line
_HEAD = 4096  # bytes that show the encoding
LISTED = 3  # examples in a message
_LONGEST_SHOWN = 200  # letters of a value in a message

_SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a name that is not UTF-8, and half a pair of UTF-16

# Byte order marks, as Windows writes them; the first that fits counts.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def listed(names: Sequence[str], count: int | None = None) -> str:
    """The first few names for a message, out of `count`."""
    count = len(names) if count is None else count
    return ", ".join(f"'{n}'" for n in names[:LISTED]) + (", ..." if count > LISTED else "")


def shown(value: Any) -> str:
    """A value for a message, shortened, as it may be a whole file."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def open_text(path: str) -> BinaryIO:
    """A caption, table or list. An empty local one is allowed, unlike an empty media file."""
    is_empty = not is_url(path) and os.path.isfile(path) and not os.path.getsize(path)
    return io.BytesIO() if is_empty else open_binary(path)


def lines_of(path: str) -> Iterator[str]:
    """The lines of a table or list, with their ends. Raises `DataError`, also for a line without end."""
    first = 1
    for block in blocks_of(path):
        for line in lines_in(block, path, first):
            yield line
            first += 1


def lines_in(block: str, path: str, first: int) -> Iterator[str]:
    """The lines of a part of `path`. Raises `DataError` for a line without end."""
    for number, line in enumerate(io.StringIO(block, newline=""), start=first):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{path}, line {number}: longer than {LONGEST_LINE} letters; a line is for one file.")
        yield line


def blocks_of(path: str) -> Iterator[str]:
    """Whole lines of a table or list, many at once; of one without end, more than `LONGEST_LINE`. Raises
    `DataError`."""
    try:
        with open_text(path) as raw:
            encoding = encoding_of(raw.read(_HEAD), path)
            raw.seek(0)
            with io.TextIOWrapper(raw, encoding=encoding, newline="") as file:
                while block := file.read(_BLOCK):
                    yield block + file.readline(LONGEST_LINE + 1)
    except UnicodeDecodeError as error:
        which = "it" if path.endswith(".txt") else "the table"
        raise DataError(f"{path}: not UTF-8 ({error.reason}); save {which} as UTF-8.") from None
    except MediaError as error:
        raise DataError(f"{path}: {error.reason}; check sources or train_data.") from error


def encoding_of(head: bytes, where: str) -> str:
    """The encoding of a text that starts with `head`. Raises `DataError` for UTF-16 and UTF-32 without a mark."""
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in head:
        raise DataError(f"{where}: it has null bytes, as in UTF-16 without a byte order mark; save it as UTF-8.")
    return encoding


def parse_json(text: str | bytes) -> Any:
    """Raises `ValueError`, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def objects_of(
    path: str, example: str, lines: Iterable[str] | None = None, first: int = 1
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, or of `lines` of it, each with its place ("line 3"). Raises `DataError`."""
    for number, line in enumerate(lines_of(path) if lines is None else lines, start=first):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            remedy = f"write one object a line, such as {example}"
            raise DataError(f"{path}, line {number}: not JSON ({error}); {remedy}.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON {type(row).__name__}; write one object a line.")
        yield f"line {number}", row


def one_line(text: str) -> str:
    """The lines of a caption, joined by spaces, without characters that UTF-8 cannot encode."""
    if "\n" in text or "\r" in text or text != text.strip():
        text = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def is_text(name: str) -> bool:
    """Whether UTF-8 can encode a file's name; names on a disk may be any bytes."""
    return _SURROGATE.search(name) is None


def folded(name: str) -> str:
    """Equal for names that differ only in case, or in how accents are written (macOS writes é as two letters)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def by_folded(names: Iterable[str]) -> dict[str, list[str]]:
    """`names` by their `folded` form."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(folded(name), []).append(name)
    return found
