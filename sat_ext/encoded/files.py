"""Safetensors files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sat_ext.errors import ConfigError, DataError

_MEGABYTE = 1 << 20


def write_aside(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `file` so that it is there whole or not at all. Raises `DataError`."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be written ({error}); free space or name another folder.") from error
    finally:
        partial.unlink(missing_ok=True)


def files_fingerprint(path: Path) -> str:
    """Of a file of weights, or of a folder's and of its config.json: names, sizes, first and last megabyte.

    Raises `ConfigError` where there is none.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("config.json"))
    if not files:
        raise ConfigError(f"{path}: there are no weights here; name a file or a folder of safetensors.")
    found = blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            found.update(content.read(_MEGABYTE))
            content.seek(max(0, size - _MEGABYTE))
            found.update(content.read(_MEGABYTE))
    return found.hexdigest()


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The safetensors file, memory-mapped. Raises `DataError` where it is not one, or a part of one."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error}); delete it, and write its embeddings anew.") from error
