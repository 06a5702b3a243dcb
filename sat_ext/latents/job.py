"""What a cache must hold, what of it is missing, and how much room that takes."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sat_ext.cogvideox import LATENT_CHANNELS, LATENT_SIDE, TEXT_TOKENS, TEXT_WIDTH, latent_frames
from sat_ext.data.index import Index
from sat_ext.data.params import DataConfig
from sat_ext.data.visits import Visit
from sat_ext.errors import DataError
from sat_ext.latents.encoders import Fingerprints
from sat_ext.latents.reader import Entries, captions_of
from sat_ext.latents.store import CacheConfig, Entry, LatentStore
from sat_ext.latents.text import TextEmbeddings, caption_key


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
        encoder, clips = self.prints.first_stage, self.settings.clips
        indices = [Entries(index=i, config=self.data, encoder=encoder, clips=clips) for i in self.indices]
        return {entry.key: (visit, entry) for entries in indices for visit, entry in entries}

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
        bad = [entry.name for entry in entries if entry.key in store.bad]
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

    def bytes_on_disk(self, itemsize: int, conditions: int) -> int:
        """An estimate for the published models, with mean and deviation of each latent frame, and `conditions`
        noisy versions of each clip's first frame beside the clean one (0: the model has no condition)."""
        numbers = len(self.captions) * TEXT_TOKENS * TEXT_WIDTH
        for bucket in (visit.bucket for visit, _ in self.samples):
            firsts = 1 + conditions if conditions and bucket.frames > 1 else 0
            frame = LATENT_CHANNELS * (bucket.height // LATENT_SIDE) * (bucket.width // LATENT_SIDE)
            numbers += frame * (2 * latent_frames(bucket.frames) + firsts)
        return numbers * itemsize


def require_room(folder: Path, needed: int) -> None:
    """Raise `DataError` where the disk of `folder` has less room than that."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: the cache will take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make "
            "room, name another folder with -o, or lower data.params.cache.clips."
        )
