"""Opens media wherever they are. One string says where, everywhere in the package:

- `clips/a.mp4`: a local file;
- `s3://bucket/a.mp4`, `https://host/a.mp4`, or any other URL of fsspec;
- `0007.tar#MEMBER@OFFSET+SIZE`: a tar's member, whose data starts at that byte;
- `rows.parquet#COLUMN@ROW.jpg`: a cell of a Parquet file that holds a whole file, here a JPEG.

Tars and Parquet files may be URLs, too.
"""

import io
import os
import stat
from functools import lru_cache
from typing import BinaryIO

import pyarrow as pa

from sat_ext.errors import MediaError
from sat_ext.files.cells import Cells
from sat_ext.files.locations import (
    ParquetCell,
    TarMember,
    cell_location,
    container_of,
    inside_of,
    is_local,
    is_url,
    member_location,
    suffix_of,
)
from sat_ext.files.ranged import RemoteFile, filesystem, info_of, reason_of
from sat_ext.files.ranges import MemberFile

__all__ = [
    "cell_location",
    "container_of",
    "filesystem",
    "fingerprint",
    "is_local",
    "is_url",
    "member_location",
    "open_binary",
    "reason_of",
    "require_unchanged",
    "size_of",
    "suffix_of",
]

# Parquet files that stay open in a process. Each may hold a page: with large cells, a row group's column.
_OPEN_TABLES = 2


def size_of(path: str) -> int:
    """Size in bytes. Raises `MediaError` for what is missing, no regular file, or empty."""
    inside = inside_of(path)
    if isinstance(inside, TarMember):
        size = inside.size
    elif isinstance(inside, ParquetCell):
        size = len(_read_cell(path, inside))
    elif is_url(path):
        size = int(info_of(path).get("size") or 0)
    else:
        size = _stat(path).st_size
    if size == 0:
        raise MediaError(path, "the file is empty (0 bytes)")
    return size


def fingerprint(path: str) -> str:
    """Changes when the file does, without reading it: size and time, for URLs what their server reports.

    For members and cells, their container's. Raises `MediaError`.
    """
    path = container_of(path)
    if not is_url(path):
        status = _stat(path)
        return f"{status.st_size}-{status.st_mtime_ns}"
    info = info_of(path)
    times = ("LastModified", "Last-Modified", "mtime", "updated", "created")
    keys = ("size", "ETag", "etag", "sha256", "md5Hash", *times)
    return "-".join(str(info[key]) for key in keys if info.get(key) is not None)


def require_unchanged(path: str, known: str, since: float) -> None:
    """Raise `MediaError` unless `path`, or its container, is the file that had the fingerprint `known` at `since`
    (seconds of `time.time`).

    Each machine of a cluster may have its own copy of a local file, with another modification time. So a file of
    the same size counts as the same unless it was changed, or put there, after `since`.
    """
    if (now := fingerprint(path)) == known:
        return
    container = container_of(path)
    if not is_url(container) and now.partition("-")[0] == known.partition("-")[0]:
        status = _stat(container)
        if max(status.st_mtime, status.st_ctime) < since:
            return
    raise MediaError(path, "replaced since it was indexed; the new file is used from the next start on")


def open_binary(path: str) -> BinaryIO:
    """`path` for reading, seekable; the caller closes it.

    Raises `MediaError` if it is missing, empty or cannot be read, for URLs also from the file's own methods;
    `ConfigError` for a kind of URL that no installed package reads.
    """
    inside = inside_of(path)
    if isinstance(inside, ParquetCell):
        return io.BytesIO(_read_cell(path, inside))
    container = inside.container if inside else path
    if inside or not is_url(path):
        size_of(path)  # raises if it is empty, which `RemoteFile` does by itself
    whole = RemoteFile(container, path) if is_url(container) else _open_local(container, path)
    return io.BufferedReader(whole if inside is None else MemberFile(whole, path, inside))


def _open_local(path: str, named: str) -> io.FileIO:
    _stat(path, named)
    try:
        return io.FileIO(path)
    except OSError as error:
        raise MediaError(named, reason_of(error)) from error


def _stat(path: str, named: str | None = None) -> os.stat_result:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise MediaError(named or path, reason_of(error)) from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
        raise MediaError(named or path, "no such file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    return status


def _read_cell(path: str, cell: ParquetCell) -> bytes:
    try:
        # By process, because forked workers must not share open files and locks.
        data = _open_cells(os.getpid(), cell.container, cell.column).read(cell.row)
    except MediaError as error:
        raise MediaError(path, error.reason) from error
    except (OSError, pa.ArrowException, KeyError, IndexError) as error:
        raise MediaError(path, reason_of(error)) from error
    if not data:
        raise MediaError(path, "its cell is empty")
    return data


@lru_cache(maxsize=_OPEN_TABLES)
def _open_cells(process: int, table: str, column: str) -> Cells:
    return Cells(open_binary(table), column)
