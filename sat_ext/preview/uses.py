"""Every use of a file by a bucket, as arrays: what the preview's histograms and findings count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.data.index import Index
from sat_ext.types import Bucket, MediaInfo


@dataclass(frozen=True, kw_only=True)
class Uses:
    """Arrays of one entry per record (a file, or the part of one, of a source that has a place in a bucket).

    `source` and `bucket` are places in the lists of names and buckets. `seconds` is the record's own length, 0 for
    a still; `fps` its rate, 0 for a still; `width` and `height` those of its crop, where it has one.
    """

    sources: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    row: np.ndarray
    source: np.ndarray
    bucket: np.ndarray
    width: np.ndarray
    height: np.ndarray
    seconds: np.ndarray
    fps: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @property
    def clip(self) -> np.ndarray:
        """Which files are clips (bool), whatever is made of them."""
        return self.seconds > 0

    @property
    def moving(self) -> np.ndarray:
        """Which are trained on as clips (bool)."""
        return self._of_bucket([b.frames for b in self.buckets]) > 1

    @property
    def cut(self) -> np.ndarray:
        """The part of the picture's area, 0 to 1, that the crop to the bucket's shape leaves out."""
        shape = self._of_bucket([b.width / b.height for b in self.buckets]) * self.height / self.width
        return 1 - np.minimum(shape, 1 / shape)

    @property
    def enlarged(self) -> np.ndarray:
        """By how much the picture's sides are enlarged (above 1) or shrunk (below 1) to cover the bucket."""
        return np.maximum(
            self._of_bucket([b.height for b in self.buckets]) / self.height,
            self._of_bucket([b.width for b in self.buckets]) / self.width,
        )

    def _of_bucket(self, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, np.float64)[self.bucket]


def uses_of(index: Index) -> Uses:
    """The index as arrays. A record that a group visits several times (by its weight, its windows) counts once."""
    sources = tuple(dict.fromkeys(g.source for g in index.groups))
    buckets = tuple(sorted({g.bucket for g in index.groups}))
    rows = [np.unique(g.rows) for g in index.groups]
    row = np.concatenate(rows).astype(np.int64)
    sizes = [len(r) for r in rows]
    columns = {name: _numbers(index.table, name, row) for name in ("width", "height", "frames", "fps", "duration")}
    start, end = _numbers(index.table, "start", row), _numbers(index.table, "end", row)
    whole = columns["duration"]
    part = np.clip(np.where(np.isnan(end), whole, np.minimum(end, whole)) - np.nan_to_num(start), 0, None)
    played = _numbers(index.table, "item_fps", row)
    retimed = ~np.isnan(played) & (columns["fps"] > 0)
    speed = np.divide(columns["fps"], played, out=np.ones_like(part), where=retimed)
    width, height = columns["width"], columns["height"]
    for at, crop in _crops(index.table, row):
        width[at], height[at] = crop
    return Uses(
        sources=sources,
        buckets=buckets,
        row=row,
        source=np.repeat([sources.index(g.source) for g in index.groups], sizes),
        bucket=np.repeat([buckets.index(g.bucket) for g in index.groups], sizes),
        width=width,
        height=height,
        seconds=np.where(columns["frames"] > 1, part * speed, 0.0),
        fps=np.where(retimed, played, columns["fps"]),
    )


def info_arrays(infos: Sequence[MediaInfo]) -> dict[str, np.ndarray]:
    """Width, height and seconds of files that have no place in a bucket."""
    return {
        "width": np.array([i.width for i in infos], np.float64),
        "height": np.array([i.height for i in infos], np.float64),
        "seconds": np.array([i.duration for i in infos], np.float64),
    }


def _numbers(table: pa.Table, name: str, row: np.ndarray) -> np.ndarray:
    """A column's values at `row`, as float64; nan for null."""
    column = pc.cast(table.column(name).take(pa.array(row)), pa.float64())
    return np.array(column.to_numpy(), np.float64)


def _crops(table: pa.Table, row: np.ndarray) -> list[tuple[int, tuple[int, int]]]:
    """Where a record is cropped by its table: its place in `row`, and the crop's width and height."""
    column = table.column("crop").take(pa.array(row))
    at = np.flatnonzero(column.is_valid().to_numpy())
    return [(int(i), tuple(column[int(i)].as_py()[2:])) for i in at]
