"""Writing: files and folders that appear whole or not at all, and the folder for caches."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

PARTIAL = ".partial"  # ends the names of drafts


def cache_folder() -> Path:
    """`$SAT_EXT_CACHE`, else `~/.cache/sat_ext`. It need not exist."""
    return Path(os.environ.get("SAT_EXT_CACHE") or Path("~/.cache/sat_ext").expanduser())


@contextmanager
def written_aside(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A draft beside `path`, for a file or folder, that takes `path`'s name when the block ends without an error.

    After an error nothing of the draft is left. With `shared` its name is unique, because other processes may be
    writing to the same `path`; otherwise it replaces the draft of a process that was killed. Raises `OSError`."""
    draft = path.with_name(f"{path.name}.{uuid4().hex}{PARTIAL}" if shared else path.name + PARTIAL)
    _remove(draft)
    try:
        yield draft
        os.replace(draft, path)
    finally:
        with suppress(OSError):  # it would hide the error that led here
            _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
