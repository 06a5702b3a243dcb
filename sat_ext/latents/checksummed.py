"""Safetensors files that appear whole or not at all, with a checksum of every byte that is used.

In the metadata, `crc32` holds that of each tensor, which is compared when the tensor is read, and `metadata_crc32`
that of the metadata, which is compared when the file is opened. Earlier versions wrote no such checksum, or none.
"""

import json
import logging
import zlib
from collections.abc import Collection, Iterator, Mapping
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
_TENSORS, _METADATA = "crc32", "metadata_crc32"
REMEDY = "delete it, and run sat-ext cache again"


def checksum_of(value: Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU."""
    flat = value.contiguous().reshape(-1)
    return zlib.crc32(flat.view(uint8).numpy().data) if flat.numel() else 0


def write_checksummed(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `file` with its checksums. Raises `DataError`."""
    metadata = {**metadata, _TENSORS: json.dumps({name: checksum_of(tensor) for name, tensor in tensors.items()})}
    try:
        with written_aside(file, shared=True) as draft:
            draft.touch()
            mode = draft.stat().st_mode  # from the umask: safetensors writes files that only their owner can read
            save_file(tensors, draft, {**metadata, _METADATA: _of_metadata(metadata)})
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
        with opened(file) as (shard, metadata):
            sums = json.loads(metadata.get(_TENSORS, "{}"))
            found = {name: shard.get_tensor(name) for name in set(shard.keys()).intersection(names)}
    except DataError as error:
        raise MediaError(str(file), str(error).removeprefix(f"{file}: ")) from error
    for name, tensor in found.items():
        if sums and sums.get(name) != checksum_of(tensor):
            raise MediaError(str(file), f"damaged: '{name}' is not what was written; {REMEDY}")
    return found


@contextmanager
def opened(file: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """The safetensors file, memory-mapped, and its metadata. Raises `DataError` where they are damaged."""
    try:
        with safe_open(file, framework="pt") as shard:
            metadata = dict(shard.metadata() or {})
            checksum = metadata.pop(_METADATA, None)
            if checksum is not None:
                # the tensors' names too: one with a flipped bit would look like a sample without its condition
                names = json.loads(metadata[_TENSORS]) if checksum == _of_metadata(metadata) else ()
                if set(names) != set(shard.keys()):
                    raise DataError(f"{file}: damaged: its header is not what was written; {REMEDY}.")
            if _TENSORS not in metadata:
                _warn_of_unsigned(file.parent)
            yield shard, metadata
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {REMEDY}.") from error


def _of_metadata(metadata: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(metadata, sort_keys=True).encode()):08x}"


@lru_cache  # one warning a folder
def _warn_of_unsigned(folder: Path) -> None:
    log.warning("%s: holds files of an earlier version, without checksums; damage in them goes unnoticed.", folder)
