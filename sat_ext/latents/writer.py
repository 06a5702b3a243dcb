"""What a cache must hold, what of it is missing, and its encoding: after a kill the same command continues."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sat_ext.cogvideox import LATENT_CHANNELS, LATENT_SIDE, TEXT_TOKENS, TEXT_WIDTH, latent_frames
from sat_ext.data.guard import Guard
from sat_ext.data.index import Index
from sat_ext.data.params import DataConfig
from sat_ext.data.visits import Visit, read_pixels, sample_capacity
from sat_ext.engines import Engine
from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.latents.encoders import Encoders, Fingerprints, Part
from sat_ext.latents.reader import Entries, captions_of
from sat_ext.latents.store import CacheConfig, Entry, LatentStore, write_latents
from sat_ext.latents.text import TextEmbeddings, caption_key, write_text_embeddings

FILE_BYTES = 256 << 20  # of one file of latents
FILE_SECONDS = 60.0  # of work that a kill loses at most

Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]  # of a description, items and their number


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


def encode_missing(
    job: CacheJob, missing: Missing, encoders: Encoders, engine: Engine, *, workers: int, progress: Progress
) -> list[MediaError]:
    """Write what is missing into the job's folder. Returns the errors of files that cannot be read, which are
    recorded in it too.

    Raises `ConfigError` where a GPU is too small for an encoder, and `DataError` where the folder cannot be
    written.
    """
    if missing.captions:
        with _fitting(encoders, "text", engine):
            write_text_embeddings(
                job.folder, missing.captions, encoders.embed, job.prints.text,
                progress=partial(progress, "captions"),
            )  # fmt: skip
    if not missing.samples:
        return []
    with _fitting(encoders, "first_stage", engine):
        return write_samples(job, missing.samples, encoders, workers=workers, progress=progress)


def write_samples(
    job: CacheJob,
    samples: Sequence[tuple[Visit, Entry]],
    encoders: Encoders,
    *,
    workers: int,
    progress: Progress,
) -> list[MediaError]:
    """Encode `samples` into files of the job's folder. Returns the errors of files that cannot be read."""
    pixels = DataLoader(_Pixels(samples, job.data), batch_size=None, num_workers=workers, shuffle=False)
    waiting: list[tuple[Entry, dict[str, Tensor]]] = []
    errors: list[MediaError] = []
    since, size = time.monotonic(), 0
    for number, found in progress("encoding", pixels, len(samples)):
        visit, entry = samples[number]
        if isinstance(found, MediaError):
            errors.append(found)
            waiting.append((replace(entry, bad=found.reason), {}))
        else:
            has_condition = encoders.conditions and visit.bucket.frames > 1  # that of a still is zero
            parts = encode_sample(encoders, found[None], entry, job.settings.conditions if has_condition else 0)
            waiting.append((entry, parts))
            size += sum(part.nbytes for part in parts.values())
        if size >= FILE_BYTES or time.monotonic() - since > FILE_SECONDS:
            write_latents(job.folder, waiting)
            waiting, since, size = [], time.monotonic(), 0
    if waiting:
        write_latents(job.folder, waiting)
    return errors


def encode_sample(
    encoders: Encoders, pixels: Tensor, entry: Entry, conditions: int, *, latents: Tensor | None = None
) -> dict[str, Tensor]:
    """The parts of one sample, from its pixels (1, T, 3, H, W), and `latents` (t, C, h, w) if they are known."""
    mean, deviation = encoders.moments(pixels) if latents is None else (latents[None], None)
    parts = {"mean": mean[0]}
    if deviation is not None:
        parts["std"] = deviation[0]
    if conditions:
        generator = torch.Generator().manual_seed(int(entry.key[:15], 16))  # the same on any rank, in any order
        first, noisy = encoders.condition(pixels, generator, conditions)
        parts |= {"first": first[0], "noisy": noisy[0]}
    return {name: value.clone() for name, value in parts.items()}  # safetensors writes no views


class _Pixels(Dataset[Any]):
    """Pixels (T, 3, H, W) of each sample, or the error of a file that cannot be read."""

    def __init__(self, samples: Sequence[tuple[Visit, Entry]], data: DataConfig) -> None:
        self.samples, self.decoder = samples, data.decoder
        largest = max(sample_capacity(visit.bucket) for visit, _ in samples)
        self._read = Guard(read_pixels, timeout=data.on_bad_sample.timeout, capacity=largest)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[int, Tensor | MediaError]:
        visit, _ = self.samples[number]
        self._read.release()
        try:
            return number, visit.pixels(self.decoder, self._read).clone()
        except MediaError as error:
            return number, error


@contextmanager
def _fitting(encoders: Encoders, part: Part, engine: Engine) -> Iterator[None]:
    """Inside, `part` is loaded. Raises `ConfigError` where the GPU is too small for it."""
    try:
        with encoders.holding(part):
            yield
    except torch.cuda.OutOfMemoryError as error:
        name = {"text": "text encoder", "first_stage": "first stage"}[part]
        raise ConfigError(
            f"the GPU's memory is too small for the {name} ({str(error).split('.')[0]}); "
            f"{engine.too_large(part)}. What is already encoded is kept; `sat-ext plan` predicts what each part "
            "takes."
        ) from error
