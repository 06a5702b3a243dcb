"""A folder of latents: written once, then read by what they were made of (docs/cache.md).

Files of latents have some hundred samples each, and list them in their metadata (`Entry`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.latents.checksummed import opened, read_tensors, write_checksummed
from sat_ext.latents.keys import KeyTable

ENTRIES = "entries"  # the key in a file's metadata
_JSON = json.JSONEncoder(sort_keys=True, default=str)
PARTS = ("mean", "std", "first", "noisy")
VERSION = 1  # raise it when latents are computed differently: every sample is then encoded again


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """`data.params.cache`: train from what `sat-ext cache` wrote, without first stage and text encoder."""

    folder: str
    clips: int = 1  # draws of each record with a random sampler; visit v uses draw v modulo `clips`
    conditions: int = 4  # noisy versions of each clip's first frame, for an image-to-video model

    def __post_init__(self) -> None:
        for name in ("clips", "conditions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.params.cache.{name}: {getattr(self, name)}; use 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the latents of one sample follow from, in parts, so that an error can name the one that changed.

    `name` is source and file; `media`, `clip` and `encoder` are fingerprints; `bad` says why the file could not be
    read, where it could not.
    """

    name: str
    media: str
    clip: str
    size: str
    encoder: str
    bad: str | None = None

    @property
    def key(self) -> str:
        """The hash of all parts."""
        return fingerprint_of(VERSION, self.name, self.media, self.clip, self.size, self.encoder)


CHANGES = {  # parts of an `Entry` and their names in an error, the likeliest first
    "media": "the file itself",
    "encoder": "the first stage",
    "size": "the size or length of its bucket",
    "clip": "the choice of its frames (fps, sampler, skip_frms_num, crop, seed)",
}


def fingerprint_of(*parts: Any) -> str:
    """A hash of plain values (numbers, text, lists, mappings)."""
    text = _JSON.encode(parts)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class LatentStore:
    """The latents of a folder, found by their keys. Opening it reads `latents.index`, and headers of new files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = KeyTable(folder, "latents", _list)

    def read(self, key: str) -> dict[str, Tensor]:
        """Those of `PARTS` that the sample has, memory-mapped.

        Raises `MediaError` for a file that could not be read when it was encoded, and for damaged latents.
        """
        found = self.table.find(key)
        if found is None:
            raise DataError(f"{self.folder}: the sample {key} is not in this cache; run sat-ext cache again.")
        file, is_bad = found
        if is_bad:
            raise MediaError(*next((e.name, str(e.bad)) for e in _entries_in(file) if e.key == key))
        names = {f"{key}.{part}": part for part in PARTS}
        return {names[name]: tensor for name, tensor in read_tensors(file, names).items()}

    def require(self, keys: np.ndarray, entry_of: Callable[[int], Entry], command: str) -> None:
        """Raise `DataError` unless all of `keys` are here. It says what changed, and which `command` adds it.

        `entry_of` is called with the place of a key in `keys`.
        """
        wanted, places = np.unique(keys, return_index=True)
        missing = places[~self.table.has(wanted)]
        if not len(missing):
            return
        first, reason = entry_of(int(missing.min())), "it was never encoded"
        files = self.table.files
        if near := [entry for file in files for entry in _entries_in(file) if entry.name == first.name]:
            nearest = max(near, key=lambda e: sum(getattr(e, p) == getattr(first, p) for p in CHANGES))
            changed = [name for part, name in CHANGES.items() if getattr(nearest, part) != getattr(first, part)]
            reason = f"since it was encoded, {' and '.join(changed)} changed"
        raise DataError(
            f"{self.folder}: {len(missing)} of {len(wanted)} samples are not in this cache (first: {first.name}, "
            f"{reason}); run {command}."
        )


def _list(file: Path) -> tuple[list[str], list[str], str]:
    with opened(file) as (shard, metadata):
        names, entries = list(shard.keys()), json.loads(metadata.get(ENTRIES, "[]"))
    keys = [name.removesuffix(".mean") for name in names if name.endswith(".mean")]
    return keys, [Entry(**values).key for values in entries if values.get("bad") is not None], ""


def _entries_in(file: Path) -> Iterator[Entry]:
    with opened(file) as (_, metadata):
        yield from (Entry(**values) for values in json.loads(metadata.get(ENTRIES, "[]")))


def write_latents(folder: Path, samples: Sequence[tuple[Entry, Mapping[str, Tensor]]]) -> None:
    """Write one file of `samples`: entries, and their tensors by the names in `PARTS`. Raises `DataError`."""
    tensors = {
        f"{entry.key}.{part}": value.contiguous() for entry, parts in samples for part, value in parts.items()
    }
    name = fingerprint_of([entry.key for entry, _ in samples])[:16]
    listed = json.dumps([asdict(entry) for entry, _ in samples])
    # a file of bad entries alone has no tensors, which safetensors does not take
    write_checksummed(
        folder / f"latents-{name}.safetensors", tensors or {"none": torch.zeros(1)}, {ENTRIES: listed}
    )
