"""A folder of latents: written once, then read by what they were made of (docs/cache.md).

Files of latents have some hundred samples each, and list them in their metadata (`Entry`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.latents.checksummed import opened, read_tensors, write_checksummed

ENTRIES = "entries"  # the key in a file's metadata
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
    text = json.dumps(parts, sort_keys=True, default=str)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class LatentStore:
    """The latents of a folder. Opening it reads the lists in its files' headers, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = sorted(folder.glob("latents-*.safetensors"))
        self._places: dict[str, int] = {}
        self.bad: dict[str, tuple[str, str]] = {}  # name and reason of what could not be read, by key
        for number, file in enumerate(self._files):
            for entry in _entries_in(file):
                if entry.bad is None:
                    self._places[entry.key] = number
                else:
                    self.bad[entry.key] = entry.name, entry.bad

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self.bad

    def read(self, key: str) -> dict[str, Tensor]:
        """Those of `PARTS` that the sample has, memory-mapped.

        Raises `MediaError` for a file that could not be read when it was encoded, and for damaged latents.
        """
        if key in self.bad:
            raise MediaError(*self.bad[key])
        names = {f"{key}.{part}": part for part in PARTS}
        found = read_tensors(self._files[self._places[key]], names)
        return {names[name]: tensor for name, tensor in found.items()}

    def require(self, wanted: Sequence[Entry], command: str) -> None:
        """Raise `DataError` unless all of `wanted` are here. It says what changed, and which `command` adds it."""
        missing = [entry for entry in wanted if entry.key not in self]
        if not missing:
            return
        first, reason = missing[0], "it was never encoded"
        if near := [entry for file in self._files for entry in _entries_in(file) if entry.name == first.name]:
            nearest = max(near, key=lambda e: sum(getattr(e, p) == getattr(first, p) for p in CHANGES))
            changed = [name for part, name in CHANGES.items() if getattr(nearest, part) != getattr(first, part)]
            reason = f"since it was encoded, {' and '.join(changed)} changed"
        raise DataError(
            f"{self.folder}: {len(missing)} of {len(wanted)} samples are not in this cache (first: {first.name}, "
            f"{reason}); run {command}."
        )


def _entries_in(file: Path) -> list[Entry]:
    with opened(file) as (_, metadata):
        return [Entry(**values) for values in json.loads(metadata.get(ENTRIES, "[]"))]


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
