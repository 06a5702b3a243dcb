"""Encodes what a cache lacks, file by file, so that after a kill the same command continues where it was."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sat_ext.data.guard import Guard
from sat_ext.data.params import DataConfig
from sat_ext.data.visits import Visit, read_pixels, sample_capacity
from sat_ext.engines import Engine
from sat_ext.errors import ConfigError, MediaError
from sat_ext.latents.encoders import Encoders, Part
from sat_ext.latents.job import CacheJob, Missing
from sat_ext.latents.store import Entry, write_latents
from sat_ext.latents.text import write_text_embeddings

FILE_BYTES = 256 << 20  # of one file of latents
FILE_SECONDS = 60.0  # of work that a kill loses at most

Progress = Callable[[str, Iterable[Any], int], Iterable[Any]]  # of a description, items and their number


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


def encode_sample(encoders: Encoders, pixels: Tensor, entry: Entry, conditions: int) -> dict[str, Tensor]:
    """The parts of one sample, from its pixels (1, T, 3, H, W)."""
    mean, deviation = encoders.moments(pixels)
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
