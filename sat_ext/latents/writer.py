"""What a cache must hold, what of it is missing, and its encoding: after a kill the same command continues."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from sat_ext.latents.reader import Entries, captions_of, require_all, sample_at
from sat_ext.latents.store import CacheConfig, Entry, LatentStore, write_latents
from sat_ext.latents.text import BATCH, TextEmbeddings, write_text_embeddings
from sat_ext.types import Bucket

FILE_BYTES = 256 << 20  # of one file of latents
FILE_SECONDS = 60.0  # of work that a kill loses at most

_SHARDS = 1000  # for each rank: more would not end much closer together

# of a description, items that begin with their place among those of all ranks, and the number of these
Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]
Take = Callable[[str], int]  # the number of the next shard of a queue that ranks share: 0, 1, ...


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
    def entries(self) -> list[Entries]:
        """Of each index."""
        encoder, clips = self.prints.first_stage, self.settings.clips
        return [Entries(index=i, config=self.data, encoder=encoder, clips=clips) for i in self.indices]

    @cached_property
    def keys(self) -> np.ndarray:
        """Of all samples, one after another as `sample_at` counts them."""
        return np.concatenate([of.keys(group) for of in self.entries for group in of.index.groups])

    def missing(self) -> "Missing":
        """What the folder does not hold."""
        wanted, first = np.unique(self.keys, return_index=True)
        samples = np.sort(first[~LatentStore(self.folder).table.has(wanted)])
        groups = [group for index in self.indices for group in index.groups]
        ends = np.cumsum([len(group.rows) * self.settings.clips for group in groups])
        which = np.searchsorted(ends, samples, side="right")
        costs = np.array([prod((g.bucket.frames, g.bucket.height, g.bucket.width)) for g in groups])[which]
        costliest = np.argsort(-costs, kind="stable")  # so what is left to the end is quick
        captions = captions_of(self.indices)
        if any(self.folder.glob("text-*.safetensors")):
            captions = TextEmbeddings(self.folder).lacking(captions)
        return Missing(
            samples=samples[costliest], costs=costs[costliest], captions=captions,
            buckets=tuple((group.bucket, int(n)) for group, n in zip(groups, np.bincount(which)) if n),
        )  # fmt: skip

    def facts(self, made: "Missing") -> dict[str, Any]:
        """Of the folder, now that what was missing is made.

        Raises `DataError` where a sample is still missing, and where more are bad than `on_bad_sample` allows.
        """
        store = LatentStore(self.folder)
        require_all(self.entries, self.keys, store, TextEmbeddings(self.folder), "the command again")
        wanted, first = np.unique(self.keys, return_index=True)
        numbers = np.sort(first[np.isin(wanted, store.table.bad)])
        bad = [sample_at(self.entries, int(number))[1].name for number in numbers]
        limit = self.data.on_bad_sample.skip
        if len(bad) > limit:
            raise DataError(
                f"{self.folder}: {len(bad)} samples cannot be read, more than data.params.on_bad_sample.skip "
                f"({limit}) allows: {', '.join(bad[:3])} ...; fix or remove them, or raise the limit."
            )
        return {
            "folder": str(self.folder), "samples": len(wanted), "encoded": len(made.samples), "bad": bad,
            "captions_encoded": len(made.captions), "clips": self.settings.clips,
            "bytes": sum(file.stat().st_size for file in self.folder.glob("*.safetensors")),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Samples and captions that a cache lacks.

    `samples` are numbers for `sample_at`, the costliest first, `costs` their pixels; `buckets` has the number of
    samples with each bucket.
    """

    samples: np.ndarray
    costs: np.ndarray
    buckets: tuple[tuple[Bucket, int], ...]
    captions: pa.Array

    def shards(self, world: int) -> np.ndarray:
        """Where the shards of `samples` that ranks take begin, and the end of the last.

        One costs as much as the costliest sample or, if that is more, a thousandth of a rank's part.
        """
        size = max(self.costs.max(initial=1), self.costs.sum() / (_SHARDS * world))
        shards = (np.cumsum(self.costs) - self.costs) // size
        return np.append(np.flatnonzero(np.diff(shards, prepend=-1)), len(self.samples))

    def bytes_on_disk(self, itemsize: int, conditions: int) -> int:
        """An estimate for the published models, with mean and deviation of each latent frame, and `conditions`
        noisy versions of each clip's first frame beside the clean one (0: the model has no condition)."""
        numbers = len(self.captions) * TEXT_TOKENS * TEXT_WIDTH
        for bucket, count in self.buckets:
            firsts = 1 + conditions if conditions and bucket.frames > 1 else 0
            frame = LATENT_CHANNELS * (bucket.height // LATENT_SIDE) * (bucket.width // LATENT_SIDE)
            numbers += count * frame * (2 * latent_frames(bucket.frames) + firsts)
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
    job: CacheJob,
    missing: Missing,
    encoders: Encoders,
    engine: Engine,
    *,
    world: int,
    take: Take,
    workers: int,
    progress: Progress,
) -> list[MediaError]:
    """Write what is missing into the job's folder, as far as no other of the `world` ranks takes it.

    Returns the errors of files that cannot be read, which are recorded in it too. Raises `ConfigError` where a GPU
    is too small for an encoder, and `DataError` where the folder cannot be written.
    """
    # a rank takes its first place before it loads an encoder, which it need not where nothing is left
    count = len(missing.captions)
    places = _places("captions", np.append(np.arange(0, count, BATCH), count), take)
    if (first := next(places, None)) is not None:
        with _fitting(encoders, "text", engine):
            pairs = ((place, missing.captions[place].as_py()) for place in chain([first], places))
            captions = (caption for _, caption in progress("captions", pairs, count))
            write_text_embeddings(job.folder, captions, encoders.embed, job.prints.text)
    places = _places("samples", missing.shards(world), take)
    if (first := next(places, None)) is None:
        return []
    with _fitting(encoders, "first_stage", engine):
        return write_samples(job, missing, chain([first], places), encoders, workers=workers, progress=progress)


def _places(name: str, bounds: np.ndarray, take: Take) -> Iterator[int]:
    while (shard := take(name)) < len(bounds) - 1:
        yield from range(bounds[shard], bounds[shard + 1])


def write_samples(
    job: CacheJob,
    missing: Missing,
    places: Iterable[int],
    encoders: Encoders,
    *,
    workers: int,
    progress: Progress,
) -> list[MediaError]:
    """Encode missing samples into files of the job's folder. Returns the errors of files that cannot be read."""
    # a sampler is asked for a place when a worker is free for it, so that ranks take no more than they can do
    pixels = DataLoader(_Pixels(job, missing), batch_size=None, num_workers=workers, sampler=places)
    waiting: list[tuple[Entry, dict[str, Tensor]]] = []
    errors: list[MediaError] = []
    since, size = time.monotonic(), 0
    for _, visit, entry, found in progress("encoding", pixels, len(missing.samples)):
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


def encode_sample(encoders: Encoders, pixels: Tensor, entry: Entry, conditions: int) -> dict[str, Tensor]:
    """The parts of one sample, from its pixels (1, T, 3, H, W)."""
    mean, deviation = encoders.moments(pixels)
    parts = {"mean": mean[0]}
    if deviation is not None:
        parts["std"] = deviation[0]
    if conditions:
        parts |= encode_conditions(encoders, pixels, entry, conditions)
    return {name: value.clone() for name, value in parts.items()}  # safetensors writes no views


def encode_conditions(encoders: Encoders, pixels: Tensor, entry: Entry, count: int) -> dict[str, Tensor]:
    """The parts that are the condition of a clip (1, T, 3, H, W), `count` of them noisy."""
    generator = torch.Generator().manual_seed(int(entry.key[:15], 16))  # the same on any rank, in any order
    first, noisy = encoders.condition(pixels, generator, count)
    return {"first": first[0].clone(), "noisy": noisy[0].clone()}


class _Pixels(Dataset[Any]):
    """Place, visit and entry of each sample, with its pixels (T, 3, H, W) or the error of a file that cannot be
    read."""

    def __init__(self, job: CacheJob, missing: Missing) -> None:
        self.entries, self.samples, self.decoder = job.entries, missing.samples, job.data.decoder
        largest = max(sample_capacity(bucket) for bucket, _ in missing.buckets)
        self._read = Guard(read_pixels, timeout=job.data.on_bad_sample.timeout, capacity=largest)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[int, Visit, Entry, Tensor | MediaError]:
        visit, entry = sample_at(self.entries, int(self.samples[place]))
        self._read.release()
        try:
            return place, visit, entry, visit.pixels(self.decoder, self._read).clone()
        except MediaError as error:
            return place, visit, entry, error


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
