"""Encodes what a data set lacks in a cache: rank by rank, file by file, and again from there after a kill."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sat_ext.cogvideox import latent_frames
from sat_ext.data.guard import Guard
from sat_ext.data.media_reader import pixels_of, read_pixels, sample_capacity
from sat_ext.data.visits import Visit
from sat_ext.errors import DataError, MediaError
from sat_ext.latents.encoders import Encoders, LatentShape
from sat_ext.latents.store import Entry, LatentStore, bytes_of, write_latents
from sat_ext.latents.text import TextEmbeddings, caption_key
from sat_ext.types import Bucket

FILE_BYTES = 256 << 20  # of one file of latents
FILE_SECONDS = 60.0  # at most that much work is lost by a kill

Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a cache lacks: samples, and captions."""

    samples: tuple[tuple[Visit, Entry], ...]
    captions: tuple[str, ...]

    def of_rank(self, rank: int, world: int) -> Work:
        """The part of one rank. It follows from the keys alone, so that ranks need not agree on anything."""
        return Work(
            samples=tuple(s for s in self.samples if int(s[1].key[:8], 16) % world == rank),
            captions=tuple(c for c in self.captions if int(caption_key(c)[:8], 16) % world == rank),
        )

    def bytes_on_disk(self, shape: LatentShape, conditions: int) -> int:
        """An estimate, from above: captions' padding and samples' conditions included."""
        tokens, width = shape.text
        latents = sum(sample_bytes(s.bucket, shape, conditions) for s, _ in self.samples)
        return latents + len(self.captions) * tokens * width * shape.item


def sample_bytes(bucket: Bucket, shape: LatentShape, conditions: int) -> int:
    """What the latents of one sample take."""
    frames = latent_frames(bucket.frames)
    frame = shape.channels * (bucket.height // shape.side) * (bucket.width // shape.side) * shape.item
    firsts = 1 + conditions if shape.conditions and bucket.frames > 1 else 0
    return frame * (frames * (2 if shape.deviates else 1) + firsts)


def missing_work(folder: Path, wanted: Iterable[tuple[Visit, Entry]], captions: Iterable[str]) -> Work:
    """What of `wanted` and `captions` (the empty one always) the folder does not hold."""
    store = LatentStore(folder)
    held = TextEmbeddings(folder).files if any(folder.glob("text-*.safetensors")) else {}
    return Work(
        samples=tuple((visit, entry) for visit, entry in wanted if entry.key not in store),
        captions=tuple(c for c in dict.fromkeys(("", *captions)) if caption_key(c) not in held),
    )


def require_room(folder: Path, needed: int) -> None:
    """Raise `DataError` where the disk of `folder` has less room than that."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: the cache will take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; make "
            "room, name another folder with -o, or lower data.params.cache.clips."
        )


class _Pixels(Dataset[Any]):
    """Pixels (T, 3, H, W) of each sample, or the error of a file that cannot be read."""

    def __init__(self, samples: Sequence[tuple[Visit, Entry]], decoder: str, timeout: float) -> None:
        self.samples, self.decoder = samples, decoder
        largest = max(sample_capacity(visit.bucket) for visit, _ in samples)
        self._read = Guard(read_pixels, timeout=timeout, capacity=largest)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[int, Tensor | MediaError]:
        visit, _ = self.samples[number]
        self._read.release()
        try:
            return number, pixels_of(visit, self.decoder, self._read).clone()
        except MediaError as error:
            return number, error


def write_samples(
    folder: Path,
    samples: Sequence[tuple[Visit, Entry]],
    encoders: Encoders,
    *,
    conditions: int,
    decoder: str,
    timeout: float,
    workers: int,
    progress: Progress = lambda items, total: items,
) -> list[MediaError]:
    """Encode `samples` into files of `folder`; the errors of those whose file cannot be read, which are kept too.

    Raises `DataError` where the folder cannot be written.
    """
    if not samples:
        return []
    pixels = DataLoader(_Pixels(samples, decoder, timeout), batch_size=None, num_workers=workers, shuffle=False)
    waiting: list[tuple[Entry, dict[str, Tensor]]] = []
    errors: list[MediaError] = []
    since, size = time.monotonic(), 0
    for number, given in progress(pixels, len(samples)):
        visit, entry = samples[number]
        if isinstance(given, MediaError):
            errors.append(given)
            waiting.append((replace(entry, bad=given.reason), {}))
        else:
            parts = encode_sample(encoders, given[None], entry, conditions if visit.bucket.frames > 1 else 0)
            waiting.append((entry, parts))
            size += bytes_of([parts])
        if size >= FILE_BYTES or time.monotonic() - since > FILE_SECONDS:
            write_latents(folder, waiting)
            waiting, since, size = [], time.monotonic(), 0
    if waiting:
        write_latents(folder, waiting)
    return errors


def encode_sample(encoders: Encoders, pixels: Tensor, entry: Entry, conditions: int) -> dict[str, Tensor]:
    """The parts of one sample, from its pixels (1, T, 3, H, W). Its noise follows from its key."""
    mean, deviation = encoders.moments(pixels)
    parts = {"mean": mean[0]}
    if deviation is not None:
        parts["std"] = deviation[0]
    if encoders.shape.conditions and conditions:
        generator = torch.Generator().manual_seed(int(entry.key[:15], 16))
        first, noisy = encoders.condition(pixels, generator, conditions)
        parts |= {"first": first[0], "noisy": noisy[0]}
    return {name: value.clone() for name, value in parts.items()}
