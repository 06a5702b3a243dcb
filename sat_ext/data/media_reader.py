"""Samples from media files: decode and transform, in a process that may hang or crash."""

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
import torch

from sat_ext.data.decode import read_frames, read_still
from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.transform import Fit
from sat_ext.data.visits import Visit, draw_caption, visit_of
from sat_ext.files import require_unchanged
from sat_ext.types import Bucket, Sample

_SLACK = 64  # bytes between the samples of a batch in shared memory


class PixelReader(Protocol):
    """`read_pixels`, as a `Guard` of it calls it."""

    def __call__(self, path: str, *args: Any) -> np.ndarray:
        """See `read_pixels`."""

    def release(self) -> None:
        """Reuse the memory of earlier results."""


def read_pixels(
    path: str, times: Sequence[float] | None, decoder: str, fit: Fit, seen: tuple[str, float]
) -> np.ndarray:
    """The pixels of one sample, uint8 (T, 3, height, width): the frames at `times`, or a still where that is None.

    Raises `MediaError`, also for a file that has been replaced since it was `seen`.
    """
    require_unchanged(path, *seen)
    pixels = read_still(path, fit=fit) if times is None else read_frames(path, times, decoder=decoder, fit=fit)
    return pixels.numpy()


def pixels_of(visit: Visit, decoder: str, read: PixelReader) -> torch.Tensor:
    """The pixels of a visit, uint8 (T, 3, height, width), until the next `release`. Raises `MediaError`."""
    fit = Fit(visit.bucket.height, visit.bucket.width, visit.item.crop)
    return torch.from_numpy(read(visit.item.path, visit.times, decoder, fit, visit.seen))


def sample_capacity(bucket: Bucket) -> int:
    """Bytes that a sample of the bucket takes in a guard's shared memory."""
    return _SLACK + 3 * prod((bucket.frames, bucket.height, bucket.width))


class MediaReader:
    """The records of an index as samples of uint8 pixels, read by `read`."""

    def __init__(self, index: Index, config: DataConfig, read: PixelReader) -> None:
        self.index, self.config, self.pixels = index, config, read

    def read(self, group: Group, record: int, number: int, rng: np.random.Generator) -> Sample:
        """A visit of a record, whatever its `number`. Raises `MediaError`."""
        visit = visit_of(self.index, self.config, group, record, rng)
        caption = draw_caption(visit.item, rng)
        return visit.sample(pixels_of(visit, self.config.decoder, self.pixels), caption)

    def release(self) -> None:
        """Reuse the memory of the samples read so far."""
        self.pixels.release()
