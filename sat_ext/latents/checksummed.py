"""Safetensors files that appear whole or not at all, with a checksum of every byte.

In the metadata, `crc32` is that of each tensor, which is compared when the tensor is read, and `header_crc32` that
of all bytes before the tensors, itself counted as zeros. Files of earlier versions have neither.
"""

import json
import logging
import re
import struct
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.files.atomic import written_aside

log = logging.getLogger(__name__)

_MEGABYTE = 1 << 20
_TENSORS, _HEADER = "crc32", "header_crc32"  # keys in the metadata
_NONE = "0" * 8
_SIGNATURE = re.compile(rb'"%s":"(.{8})"' % _HEADER.encode(), re.DOTALL)
_LONGEST_HEADER = 100_000_000  # bytes: safetensors' own limit
REMEDY = "delete it, and run sat-ext cache again"


def checksum_of(value: Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU."""
    flat = value.contiguous().reshape(-1)
    return zlib.crc32(flat.view(uint8).numpy().data) if flat.numel() else 0


def write_checksummed(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `file` with its checksums. Raises `DataError`."""
    sums = json.dumps({name: checksum_of(tensor) for name, tensor in tensors.items()})
    try:
        with written_aside(file, shared=True) as draft:
            draft.touch()
            mode = draft.stat().st_mode  # from the umask: safetensors writes files that only their owner can read
            save_file(tensors, draft, {**metadata, _TENSORS: sums, _HEADER: _NONE})
            _sign(draft)
            draft.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be written ({error}); free space or name another folder.") from error


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


def read_tensors(file: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Those of `names` that `file` has, memory-mapped. Raises `MediaError` where one is damaged."""
    try:
        with opened(file) as shard:
            sums = json.loads(shard.metadata().get(_TENSORS, "{}")) if shard.metadata() else {}
            found = {name: shard.get_tensor(name) for name in set(shard.keys()).intersection(names)}
    except DataError as error:
        raise MediaError(str(file), str(error).removeprefix(f"{file}: ")) from error
    for name, tensor in found.items():
        if sums and sums.get(name) != checksum_of(tensor):
            raise MediaError(str(file), f"damaged: '{name}' is not what was written; {REMEDY}")
    return found


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The safetensors file, memory-mapped. Raises `DataError` where it is not one, or its header is damaged."""
    try:
        with file.open("rb") as stream:
            header = _header(stream)
        signature = _SIGNATURE.search(header)
        if signature is None:
            _warn_of_unsigned(file.parent)
        if signature and signature[1] != _checksum(header, signature.start(1)):
            raise DataError(f"{file}: damaged: its header is not what was written; {REMEDY}.")
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {REMEDY}.") from error


@lru_cache
def _warn_of_unsigned(folder: Path) -> None:
    log.warning("%s: holds files of an earlier version, without checksums; damage in them goes unnoticed.", folder)


def _header(stream: Any) -> bytes:
    """The bytes before the tensors: the header's length, and the header."""
    length: bytes = stream.read(8)
    if len(length) < 8 or (size := struct.unpack("<Q", length)[0]) > _LONGEST_HEADER:
        raise SafetensorError("not a safetensors file")
    header: bytes = stream.read(size)
    return length + header


def _checksum(header: bytes, place: int) -> bytes:
    without = header[:place] + _NONE.encode() + header[place + len(_NONE) :]
    return b"%08x" % zlib.crc32(without)


def _sign(file: Path) -> None:
    with file.open("r+b") as stream:
        header = _header(stream)
        signature = _SIGNATURE.search(header)
        assert signature is not None
        stream.seek(signature.start(1))
        stream.write(_checksum(header, signature.start(1)))
