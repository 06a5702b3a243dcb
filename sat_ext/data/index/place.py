"""Rows of a source to their buckets: which can be used, their windows, and their visits an epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.data.buckets import assign
from sat_ext.data.clips import available_frames, find_sampler, records_of
from sat_ext.data.columns import FILE_COLUMNS, ITEM_COLUMNS, to_info
from sat_ext.data.params import DataConfig
from sat_ext.data.parts import part_info
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import MediaError
from sat_ext.types import Bucket, Item, MediaInfo

_MOST_WANTED = 1e15  # visits: more than any run makes, and still a whole number
WEIGHT_TOLERANCE = 0.05  # by how much the visits of a record may miss its weight, as a part of it

LEFT_OUT_COLUMNS = pa.schema([("path", pa.string()), ("reason", pa.string())])

# What a row holds -> its bucket's number and its number of windows, or why it has no bucket; None: the source
# does not use it
Place = Callable[[MediaInfo], "tuple[int, int] | str | None"]

_PART = ["path", "weight", "start", "end", "crop", "item_fps"]
_MEASURES = ("width", "height", "frames", "fps", "duration")
_NOWHERE, _BY_ITSELF = (-1, -1), (-2, -2)
_DROPPED = -3  # beside the number of its reason


@dataclass(frozen=True, kw_only=True)
class Placed:
    """The rows of a source that can be used, and what was left out, by path and reason.

    `batches` have `ITEM_COLUMNS` and `FILE_COLUMNS`; `bucket` (a number), `windows` and `weight` an entry a row.
    `dropped` is a table, as it may be most of the source.
    """

    batches: list[pa.RecordBatch]
    bucket: np.ndarray
    windows: np.ndarray
    weight: np.ndarray
    bad: list[tuple[str, str]]
    dropped: pa.Table


def place_rows(items: Sequence[pa.RecordBatch], infos: Sequence[pa.Table], place: Place) -> Placed:
    """Put every row into its bucket. `infos` describe its file: `FILE_COLUMNS`, and `reason` if it is bad."""
    batches, numbers = [], []
    bad: list[tuple[str, str]] = []
    dropped: list[pa.RecordBatch] = []
    alike = _Alike(place)
    for batch, info in zip(items, infos):
        found = alike.places(info)
        rows = np.flatnonzero((found[:, 0] == _BY_ITSELF[0]) | ~_is_whole(batch))  # the others go all at once
        found[rows] = _NOWHERE
        given, held = (table.take(pa.array(rows)).to_pylist() for table in (batch.select(_PART), info))
        for row, own, entry in zip(rows.tolist(), given, held):
            path, weight = own.pop("path"), own.pop("weight")
            try:
                if entry["reason"] is not None:
                    raise MediaError(path, entry["reason"])
                item = Item(path=path, key="", captions=(), fps=own.pop("item_fps"), **own)
                verdict = place(part_info(item, to_info(entry))) if weight else "its weight is 0"
            except MediaError as error:
                bad.append((path, error.reason))
                continue
            if verdict is not None:
                found[row] = alike.numbers(verdict)
        kept, gone = found[:, 0] >= 0, found[:, 0] == _DROPPED
        dropped.append(
            pa.record_batch(
                [batch["path"].filter(gone), alike.reasons_of(found[gone, 1])], schema=LEFT_OUT_COLUMNS
            )
        )
        columns = [*batch.columns, *(info[name].combine_chunks() for name in FILE_COLUMNS.names)]
        whole_batch = pa.record_batch(columns, names=[*ITEM_COLUMNS.names, *FILE_COLUMNS.names])
        batches.append(whole_batch if kept.all() else whole_batch.filter(pa.array(kept)))
        numbers.append(found[kept])
    bucket, windows = np.concatenate(numbers).T
    weights = np.concatenate([batch.column("weight").to_numpy() for batch in batches])
    return Placed(
        batches=batches, bucket=bucket, windows=windows, weight=weights, bad=bad,
        dropped=pa.Table.from_batches(dropped),
    )  # fmt: skip


class _Alike:
    """Places whole files: those of one size, length and rate share theirs."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._known: dict[bytes, tuple[int, int]] = {}
        self._reasons: dict[str, int] = {}

    def numbers(self, verdict: "tuple[int, int] | str") -> tuple[int, int]:
        """A bucket and windows; for a reason `_DROPPED` and its number."""
        if isinstance(verdict, str):
            return _DROPPED, self._reasons.setdefault(verdict, len(self._reasons))
        return verdict

    def reasons_of(self, numbers: np.ndarray) -> pa.Array:
        return pa.array([*self._reasons], pa.string()).take(pa.array(numbers))

    def places(self, info: pa.Table) -> np.ndarray:
        """The `numbers` of each row, `_NOWHERE`, or `_BY_ITSELF` for a bad file."""
        columns = [info[name].to_numpy().astype(np.float64) for name in _MEASURES]
        measures = np.stack([*columns, info["reason"].is_valid().to_numpy()], axis=1)
        rows = measures.view(np.dtype((np.void, measures.itemsize * measures.shape[1])))[:, 0]
        _, first, alike = np.unique(rows, return_index=True, return_inverse=True)
        found = np.array([self._of(rows[row].tobytes(), measures[row]) for row in first], np.int64)
        return found[alike.reshape(-1)]

    def _of(self, key: bytes, measures: np.ndarray) -> tuple[int, int]:
        if key not in self._known:
            width, height, frames, fps, duration, is_bad = measures.tolist()
            size = {"width": int(width), "height": int(height), "frames": int(frames)}
            info = MediaInfo(**size, fps=fps, duration=duration, codec="")
            self._known[key] = _BY_ITSELF if is_bad else self.numbers(self._place(info) or _NOWHERE)
        return self._known[key]


def _is_whole(batch: pa.RecordBatch) -> np.ndarray:
    """Which rows name no part of their file, and are not left out by their weight."""
    parts = [pc.is_valid(batch[name]) for name in ("end", "crop", "item_fps")]
    parts += [pc.not_equal(batch["start"], 0.0), pc.equal(batch["weight"], 0.0)]
    return ~np.any([part.to_numpy(zero_copy_only=False) for part in parts], axis=0)


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
