"""Rows of a source to their buckets: which can be used, their windows, and their visits an epoch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from sat_ext.data.buckets import assign
from sat_ext.data.clips import available_frames, find_sampler, records_of
from sat_ext.data.index.columns import FILE_COLUMNS, INFO_COLUMNS, ITEM_COLUMNS
from sat_ext.data.params import DataConfig
from sat_ext.data.parts import part_info
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import MediaError
from sat_ext.types import Bucket, Item, MediaInfo

_MOST_WANTED = 1e15  # visits: more than any run makes, and still a whole number
WEIGHT_TOLERANCE = 0.05  # by how much the visits of a record may miss its weight, as a part of it

# What a row holds -> its bucket's number and its number of windows, or why it has no bucket; None: the source
# does not use it
Place = Callable[[MediaInfo], "tuple[int, int] | str | None"]

_PART = ("start", "end", "crop", "item_fps")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The rows of a source that can be used, and what was left out, as (path, reason).

    `batches` have `ITEM_COLUMNS` and `FILE_COLUMNS`; `bucket` (a number), `windows` and `weight` an entry a row.
    """

    batches: list[pa.RecordBatch]
    bucket: np.ndarray
    windows: np.ndarray
    weight: np.ndarray
    bad: list[tuple[str, str]]
    dropped: list[tuple[str, str]]


def place_rows(items: Sequence[pa.RecordBatch], infos: Sequence[pa.Table], place: Place) -> Placed:
    """Put every row into its bucket. `infos` describe its file: `FILE_COLUMNS`, and `reason` if it is bad."""
    batches, numbers = [], []
    bad: list[tuple[str, str]] = []
    dropped: list[tuple[str, str]] = []
    for batch, info in zip(items, infos):
        found = np.full((batch.num_rows, 2), -1, np.int64)
        for row, (path, weight, reason, whole, part) in enumerate(_rows(batch, info)):
            try:
                if reason is not None:
                    raise MediaError(path, reason)
                verdict = place(part_info(part, whole) if part else whole) if weight else "its weight is 0"
            except MediaError as error:
                bad.append((path, error.reason))
                continue
            if isinstance(verdict, str):
                dropped.append((path, verdict))
            elif verdict is not None:
                found[row] = verdict
        kept = found[:, 0] >= 0
        columns = [*batch.columns, *(info[name].combine_chunks() for name in FILE_COLUMNS.names)]
        whole_batch = pa.record_batch(columns, names=[*ITEM_COLUMNS.names, *FILE_COLUMNS.names])
        batches.append(whole_batch if kept.all() else whole_batch.filter(pa.array(kept)))
        numbers.append(found[kept])
    bucket, windows = np.concatenate(numbers).T
    weights = np.concatenate([batch.column("weight").to_numpy() for batch in batches])
    return Placed(batches=batches, bucket=bucket, windows=windows, weight=weights, bad=bad, dropped=dropped)


def placer(source: SourceConfig, buckets: Sequence[Bucket], config: DataConfig) -> Place:
    """The rule for the records of `source`. Numbers count from 0, in `buckets`."""
    sampler, only_stills = source.sampler, find_sampler(source.sampler).still
    numbers = {bucket: number for number, bucket in enumerate(buckets)}

    @lru_cache(maxsize=1 << 16)  # sizes and lengths repeat, and there may be many buckets to compare with
    def assigned(width: int, height: int, still: bool, available: int) -> Bucket | str:
        info = MediaInfo(width=width, height=height, frames=2 - still, fps=0.0, duration=0.0, codec="")
        return assign(info, buckets, available=available, still=still, short=config.short_clips)

    def place(info: MediaInfo) -> tuple[int, int] | str | None:
        if source.kind not in (None, info.kind):
            return None
        still = only_stills or info.frames == 1
        available = 1 if still else available_frames(info, config.fps)
        bucket = assigned(info.width, info.height, still, available)
        if isinstance(bucket, str):
            return bucket
        skip = config.skip_frms_num
        return numbers[bucket], records_of(sampler, info, frames=bucket.frames, fps=config.fps, skip_frames=skip)

    return place


def visits_by_weight(weights: np.ndarray) -> np.ndarray:
    """How often an epoch visits the records of a source with these weights (float64, above 0), as int64.

    The smallest whole numbers in proportion to the weights, within 5 % of each. The smallest weight makes at most
    ten visits, at which rounding is less than 5 %.

    >>> visits_by_weight(np.array([1.0, 1.5, 4.0])), visits_by_weight(np.array([0.3, 0.3]))
    (array([2, 3, 8]), array([1, 1]))
    """
    unique, places = np.unique(weights, return_inverse=True)
    for smallest in range(1, 11):
        with np.errstate(over="ignore"):
            wanted = np.minimum(unique / unique[0] * smallest, _MOST_WANTED)
        if (np.abs(np.rint(wanted) - wanted) <= WEIGHT_TOLERANCE * wanted + 1e-9).all():
            break
    return np.rint(wanted).astype(np.int64)[places]


def _rows(
    batch: pa.RecordBatch, info: pa.Table
) -> Iterator[tuple[str, float, str | None, MediaInfo, Item | None]]:
    """Path, weight, why the file is bad, what it holds, and the item if it names a part of the file."""
    items = zip(*(_values(batch.column(name)) for name in ("path", "weight", *_PART)))
    wholes = zip(*(_values(info[name].combine_chunks()) for name in ("reason", *INFO_COLUMNS.names)))
    for (path, weight, *part), (reason, width, height, frames, fps, duration, codec) in zip(items, wholes):
        item = None
        if part != [0.0, None, None, None]:
            start, end, crop, speed = part
            item = Item(path=path, key="", captions=(), start=start, end=end, crop=crop, fps=speed)
        whole = MediaInfo(width=width, height=height, frames=frames, fps=fps, duration=duration, codec=codec)
        yield path, weight, reason, whole, item


def _values(column: pa.Array) -> list[Any]:
    """`to_pylist`, in a tenth of its time for most columns."""
    if column.null_count == len(column):
        return [None] * len(column)
    numbers = pa.types.is_primitive(column.type) and not column.null_count
    return column.to_numpy().tolist() if numbers else column.to_pylist()
