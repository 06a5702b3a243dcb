"""What a cache must hold, what of it is missing, and how much room that takes."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sat_ext.cogvideox import latent_frames
from sat_ext.data.index import Index
from sat_ext.data.params import DataConfig
from sat_ext.data.visits import Visit
from sat_ext.errors import DataError
from sat_ext.latents.encoders import Fingerprints, LatentShape
from sat_ext.latents.reader import Entries, captions_of, media_codes
from sat_ext.latents.store import CacheConfig, Entry, LatentStore
from sat_ext.latents.text import TextEmbeddings, caption_key
from sat_ext.types import Bucket


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """The cache of the records of some indices: `settings` name its folder, `prints` its encoders."""

    indices: Sequence[Index]
    data: DataConfig
    settings: CacheConfig
    prints: Fingerprints

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.settings.folder)

    @cached_property
    def samples(self) -> dict[str, tuple[Visit, Entry]]:
        """All samples by their entries' keys."""
        return {entry.key: (visit, entry) for visit, entry in self._entries()}

    def missing(self) -> "Missing":
        """What the folder does not hold."""
        store = LatentStore(self.folder)
        held = TextEmbeddings(self.folder).files if any(self.folder.glob("text-*.safetensors")) else {}
        captions = dict.fromkeys(caption for index in self.indices for caption in captions_of(index))
        return Missing(
            samples=tuple(sample for key, sample in self.samples.items() if key not in store),
            captions=tuple(caption for caption in captions if caption_key(caption) not in held),
        )

    def facts(self, made: "Missing") -> dict[str, Any]:
        """Of the folder, now that what was missing is made.

        Raises `DataError` where a sample is still missing, and where more are bad than `on_bad_sample` allows.
        """
        store = LatentStore(self.folder)
        entries = [entry for _, entry in self.samples.values()]
        store.require(entries, "the command again")
        bad = [entry.name for entry in entries if store.is_bad(entry.key)]
        limit = self.data.on_bad_sample.skip
        if len(bad) > limit:
            raise DataError(
                f"{self.folder}: {len(bad)} samples cannot be read, more than data.params.on_bad_sample.skip "
                f"({limit}) allows: {', '.join(bad[:3])} ...; fix or remove them, or raise the limit."
            )
        return {
            "folder": str(self.folder), "samples": len(entries), "encoded": len(made.samples), "bad": bad,
            "captions_encoded": len(made.captions), "clips": self.settings.clips,
            "bytes": sum(file.stat().st_size for file in self.folder.glob("*.safetensors")),
        }  # fmt: skip

    def _entries(self) -> Iterator[tuple[Visit, Entry]]:
        for index in self.indices:
            yield from Entries(
                index=index, config=self.data, encoder=self.prints.first_stage, clips=self.settings.clips,
                media=media_codes(index),
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Samples and captions that a cache lacks."""

    samples: tuple[tuple[Visit, Entry], ...]
    captions: tuple[str, ...]

    def of_rank(self, rank: int, world: int) -> "Missing":
        """The part of one rank. It follows from the keys alone, so that ranks need not agree on anything."""
        return Missing(
            samples=tuple(s for s in self.samples if int(s[1].key[:8], 16) % world == rank),
            captions=tuple(c for c in self.captions if int(caption_key(c)[:8], 16) % world == rank),
        )

    def bytes_on_disk(self, shape: LatentShape, conditions: int) -> int:
        """An estimate from above: captions' padding and samples' conditions included."""
        tokens, width = shape.text
        latents = sum(sample_bytes(visit.bucket, shape, conditions) for visit, _ in self.samples)
        return latents + len(self.captions) * tokens * width * shape.item


def sample_bytes(bucket: Bucket, shape: LatentShape, conditions: int) -> int:
    """What the latents of one sample take."""
    frame = shape.channels * (bucket.height // shape.side) * (bucket.width // shape.side) * shape.item
    firsts = 1 + conditions if shape.conditions and bucket.frames > 1 else 0
    return frame * (latent_frames(bucket.frames) * (2 if shape.deviates else 1) + firsts)


def require_room(folder: Path, needed: int) -> None:
    """Raise `DataError` where the disk of `folder` has less room than that."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: the cache will take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make "
            "room, name another folder with -o, or lower data.params.cache.clips."
        )
