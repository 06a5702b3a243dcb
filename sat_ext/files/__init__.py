"""Opens media wherever they are. One string says where, everywhere in the package:

- `clips/a.mp4`: a local file;
- `s3://bucket/a.mp4`, `https://host/a.mp4`, or any other URL of fsspec;
- `0007.tar#MEMBER@OFFSET+SIZE`: a tar's member, whose data starts at that byte;
- `rows.parquet#COLUMN@ROW.jpg`: a cell of a Parquet file that holds a whole file, here a JPEG.

Tars and Parquet files may be URLs, too."""

import io
import os
import stat
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from sat_ext.errors import MediaError
from sat_ext.files.cells import Cells
from sat_ext.files.locations import ParquetCell, container_of, inside_of, is_local, is_url, suffix_of
from sat_ext.files.ranged import EMPTY, REPLACED, MemberFile, RemoteFile, info_of, reason_of
from sat_ext.types import IMAGE_EXTENSIONS

__all__ = ["container_of", "expect", "fingerprint", "is_local", "is_url", "open_ahead", "open_binary",
           "require_file", "require_unchanged", "states", "suffix_of"]  # fmt: skip

# Parquet files that stay open in a process. Each may hold a page: with large cells, a row group's column.
_OPEN_TABLES = 2

_AT_ONCE = 8  # files that are opened ahead
_SMALL = 4 << 20  # bytes of a still that is fetched whole
_START = 128 << 10  # bytes of a clip: FFmpeg reads its first frame before it seeks to another


def require_file(path: str, named: str | None = None) -> os.stat_result:
    """The status of the local file `path`, which errors call `named`. Raises `MediaError` for what is missing, not
    a regular file, or empty."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise MediaError(named or path, reason_of(error)) from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe could block forever
        raise MediaError(named or path, "no such file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if not status.st_size:
        raise MediaError(named or path, EMPTY)
    return status


def fingerprint(path: str) -> str:
    """Changes when the file (for members and cells, their container) does: size and time of a local file, what the
    server reports of a URL. Raises `MediaError`."""
    opened = _opened_ahead(os.getpid()).get(path)
    path = container_of(path)
    if not is_url(path):
        status = require_file(path)
        return f"{status.st_size}-{status.st_mtime_ns}"
    info = opened.result().raw.info if opened else info_of(path)
    # The first that there is: MinIO and Ceph list an object's time in milliseconds, but report it in seconds.
    times = ("LastModified", "Last-Modified", "mtime", "updated", "created")
    tag = next((info[key] for key in ("ETag", "etag", "sha256", "md5Hash", *times) if info.get(key)), "")
    return f"{info.get('size')}-{tag}"


def states(paths: Iterable[str]) -> tuple[pa.Array, pa.Array]:
    """Sizes and modification times in nanoseconds of local files; -1 for what is missing or not a regular file.

    With a dash between, the two are the `fingerprint` of a file that is not empty.
    """
    found: list[tuple[int, int]] = []
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            found.append((-1, -1))
        else:
            regular = stat.S_ISREG(status.st_mode)
            found.append((status.st_size, status.st_mtime_ns) if regular else (-1, -1))
    sizes, times = np.array(found, np.int64).reshape(-1, 2).T
    return pa.array(sizes), pa.array(times)


def require_unchanged(path: str, known: str, since: float) -> None:
    """Raise `MediaError` unless `path` still has the fingerprint `known`, taken at `since` (`time.time`)."""
    if (now := fingerprint(path)) == known:
        return
    container = container_of(path)
    # Each node of a cluster may have its own copy of a local file, with another modification time. So a file of
    # the same size counts as the same unless it was changed, or put there, after `since`.
    if not is_url(container) and now.partition("-")[0] == known.partition("-")[0]:
        status = require_file(container)
        if max(status.st_mtime, status.st_ctime) < since:
            return
    raise MediaError(path, REPLACED)


def open_binary(path: str) -> BinaryIO:
    """`path` for reading, seekable; the caller closes it.

    Raises `MediaError` if it is missing, empty or cannot be read, for URLs also from the file's own methods;
    `ConfigError` for a kind of URL that no installed package reads."""
    opened = _opened_ahead(os.getpid()).pop(path, None)
    return opened.result() if opened else _open(path)


def _open(path: str, known: str = "") -> BinaryIO:
    inside = inside_of(path)
    if isinstance(inside, ParquetCell):
        return io.BytesIO(_read_cell(path, inside))
    if inside is not None and not inside.size:
        raise MediaError(path, EMPTY)
    container = container_of(path)
    whole = RemoteFile(container, path, known) if is_url(container) else _open_local(container, path)
    return io.BufferedReader(whole if inside is None else MemberFile(whole, path, inside))


def open_ahead(known: Iterable[tuple[str, str]]) -> None:
    """Begin to open those of `known` (path, fingerprint) that are behind URLs, and to fetch their starts, small
    stills as a whole. What earlier calls have begun is dropped if it is not among them."""
    opened = _opened_ahead(os.getpid())
    wanted = {p: seen for p, seen in known if is_url(p) and not isinstance(inside_of(p), ParquetCell)}
    kept = {p: opened.get(p) or _pool(os.getpid()).submit(_open_and_peek, p, seen) for p, seen in wanted.items()}
    opened.clear()
    opened.update(kept)


def _open_and_peek(path: str, known: str) -> Any:
    file: Any = _open(path, known)
    is_small = suffix_of(path) in IMAGE_EXTENSIONS and file.raw.size <= _SMALL
    expect(file, 0, file.raw.size if is_small else _START)
    file.peek()
    return file


def expect(file: Any, start: int, stop: int) -> None:
    """Tell a file of `open_binary` that it will be read from `start` to `stop`: a remote one does it at once."""
    if is_told := getattr(getattr(file, "raw", None), "expect", None):
        is_told(start, stop)


@lru_cache(maxsize=1)  # of the process, as futures do not survive a fork
def _opened_ahead(process: int) -> dict[str, Future[Any]]:
    return {}


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_AT_ONCE)


def _open_local(path: str, named: str) -> io.FileIO:
    require_file(path, named)
    try:
        return io.FileIO(path)
    except OSError as error:
        raise MediaError(named, reason_of(error)) from error


def _read_cell(path: str, cell: ParquetCell) -> bytes:
    try:
        # Cached by process, because forked workers must not share open files and locks.
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
