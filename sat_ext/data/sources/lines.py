"""Tables and lists, line by line."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import BinaryIO

from sat_ext.data.sources.listing import encoding_of
from sat_ext.errors import DataError, MediaError
from sat_ext.files import is_url, open_binary

# In letters; Python's own limit for a cell of CSV is 128 KiB. What JSON makes of it takes up to 20 times as much.
LONGEST_LINE = 4 << 20
_HEAD = 4096  # bytes that tell the encoding


def lines_of(path: str) -> Iterator[str]:
    """The lines of a table or a list, with their ends. Raises `DataError`, also for one that is endless."""
    try:
        with open_list(path) as raw:
            encoding = encoding_of(raw.read(_HEAD), path)
            raw.seek(0)
            with io.TextIOWrapper(raw, encoding=encoding, newline="") as file:
                number = 0
                while line := file.readline(LONGEST_LINE + 1):
                    number += 1
                    if len(line) > LONGEST_LINE:
                        raise DataError(
                            f"{path}, line {number}: longer than {LONGEST_LINE} letters; a line is for one file."
                        )
                    yield line
    except UnicodeDecodeError as error:
        which = "it" if path.endswith(".txt") else "the table"
        raise DataError(f"{path}: not UTF-8 ({error.reason}); save {which} as UTF-8.") from None
    except MediaError as error:
        raise DataError(f"{path}: {error.reason}; check sources or train_data.") from error


def open_list(path: str) -> BinaryIO:
    """A table or a list. An empty local one is an error of its own, not that of a media file."""
    is_empty = not is_url(path) and os.path.isfile(path) and not os.path.getsize(path)
    return io.BytesIO() if is_empty else open_binary(path)
