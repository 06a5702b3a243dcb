"""Every use of a file by a bucket, as arrays: what the preview's histograms and findings count."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sat_ext.data.clips import available_frames, find_sampler
from sat_ext.data.columns import to_info, to_item
from sat_ext.data.index import Index
from sat_ext.data.parts import part_info
from sat_ext.types import MediaInfo

_FIELDS = ("width", "height", "seconds", "fps", "available")


@dataclass(frozen=True, kw_only=True)
class Uses:
    """Arrays with one entry for each row of the index's table: a file, or a part of one, in a bucket.

    `part` has its width, height, `seconds` (0 for a still), `fps`, and frames `available` at the model's rate, and
    `left_out` the same of the files without a bucket. `moving`: the row trains as a clip. `cut` is the part of the
    picture's area, 0 to 1, that is cropped, and `enlarged` the factor by which its sides grow. `lengths` are the
    frames available in each clip that is not meant to train as a still, with or without a bucket."""

    part: np.ndarray
    left_out: np.ndarray
    moving: np.ndarray
    cut: np.ndarray
    enlarged: np.ndarray
    lengths: np.ndarray


def uses_of(index: Index, fps: int, left_out: Sequence[MediaInfo]) -> Uses:
    """The index as arrays. A row that an epoch visits several times (by its weight, its windows) counts once."""
    target = np.empty((len(index.table), 4))
    for group in index.groups:
        bucket, as_still = group.bucket, find_sampler(index.samplers[group.source]).still
        target[group.rows] = bucket.frames, bucket.height, bucket.width, as_still
    frames, height, width, as_still = target.T
    # batch by batch: a million rows as Python objects would take gigabytes
    rows = (row for batch in index.table.to_batches() for row in batch.to_pylist())
    part = _measured((part_info(to_item(row), to_info(row)) for row in rows), fps)
    gone = _measured(left_out, fps)
    shape = width / height * part["height"] / part["width"]
    meant = (part["seconds"] > 0) & (as_still == 0)
    return Uses(
        part=part,
        left_out=gone,
        moving=frames > 1,
        cut=1 - np.minimum(shape, 1 / shape),
        enlarged=np.maximum(height / part["height"], width / part["width"]),
        lengths=np.concatenate([part["available"][meant], gone["available"][gone["seconds"] > 0]]),
    )


def _measured(infos: Iterable[MediaInfo], fps: int) -> np.ndarray:
    values = ((i.width, i.height, i.duration, i.fps, available_frames(i, fps)) for i in infos)
    return np.fromiter(values, [(name, np.float64) for name in _FIELDS])
