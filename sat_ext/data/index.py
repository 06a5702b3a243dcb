"""All records of a run: every file of every source probed once, and put into its bucket. Columnar (Arrow)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa

from sat_ext.data.buckets import assign
from sat_ext.data.clips import STILL_SAMPLERS, available_frames
from sat_ext.data.config import DataConfig, name_sources
from sat_ext.data.probe import probe
from sat_ext.data.sources import SourceConfig, read_source
from sat_ext.errors import DataError, MediaError
from sat_ext.types import Bucket, Item, MediaInfo

log = logging.getLogger(__name__)

COLUMNS = pa.schema(
    [
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("path", pa.string()),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("frames", pa.int64()),
        ("fps", pa.float64()),
        ("duration", pa.float64()),
        ("codec", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows (uint32, into `Index.table`) of one source that fall into one bucket."""

    source: str
    bucket: Bucket
    rows: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Index:
    """`table` holds every record that can be trained on; `groups` sorts its rows by source and bucket.

    `samplers` and `shares` are by source name. `bad` are the files that could not be read and `dropped` those
    that fit no bucket, each as (path, reason).
    """

    table: pa.Table
    groups: tuple[Group, ...]
    samplers: dict[str, str]
    shares: dict[str, float]
    bad: tuple[tuple[str, str], ...]
    dropped: tuple[tuple[str, str], ...]

    def item(self, row: int) -> tuple[Item, MediaInfo]:
        """The file and what it holds, of one row."""
        values = {name: self.table.column(name)[row].as_py() for name in COLUMNS.names}
        info = MediaInfo(**{k: values[k] for k in ("width", "height", "frames", "fps", "duration", "codec")})
        return Item(path=values["path"], caption=values["caption"], key=values["key"]), info

    def summary(self) -> str:
        """One line for the log: records by source and bucket, and what was left out."""
        parts = [f"{g.source} {g.bucket}: {len(g.rows)}" for g in self.groups]
        return (
            f"{self.table.num_rows} records ({', '.join(parts)}); {len(self.bad)} unreadable, "
            f"{len(self.dropped)} in no bucket"
        )


Probed = tuple[str, Item, "MediaInfo | MediaError"]


def build_index(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    *,
    probing: Callable[[Iterable[Probed], int], Iterable[Probed]] = lambda found, total: found,
) -> Index:
    """Read and probe `sources`, and put each record into its bucket.

    `probing` wraps the iteration over files, given their number: a progress bar. Raises `DataError` when a
    source is empty, when more files are unreadable than `on_bad_sample.skip` allows, or when no record of a
    source fits a bucket.
    """
    named = name_sources(tuple(sources), "sources")
    buckets = config.make_buckets()
    found = [(name, item) for name, source in named.items() for item in read_source(source.path)]
    rows: list[tuple[str, Item, MediaInfo]] = []
    members: dict[tuple[str, Bucket], list[int]] = {}
    bad: list[tuple[str, str]] = []
    dropped: list[tuple[str, str]] = []
    for name, item, info in probing(_probe_all(found), len(found)):
        if isinstance(info, MediaError):
            log.warning("left out, mend or remove it: %s", info)
            bad.append((info.path, info.reason))
            continue
        bucket = _bucket_of(info, named[name], buckets, config)
        if isinstance(bucket, str):
            dropped.append((item.path, bucket))
            continue
        members.setdefault((name, bucket), []).append(len(rows))
        rows.append((name, item, info))
    _refuse_if_spoilt(named, {name for name, _, _ in rows}, bad, dropped, config)
    groups = tuple(
        Group(source=name, bucket=bucket, rows=np.array(ids, dtype=np.uint32))
        for (name, bucket), ids in sorted(members.items(), key=lambda m: (list(named).index(m[0][0]), m[0][1]))
    )
    counts = {name: sum(len(g.rows) for g in groups if g.source == name) for name in named}
    return Index(
        table=_table(rows),
        groups=groups,
        samplers={name: s.sampler for name, s in named.items()},
        shares={name: float(counts[name]) if s.share is None else s.share for name, s in named.items()},
        bad=tuple(bad),
        dropped=tuple(dropped),
    )


def _probe_all(found: list[tuple[str, Item]]) -> Iterable[Probed]:
    probed_once = cache(probe)  # a folder can be the path of several sources

    def one(entry: tuple[str, Item]) -> Probed:
        name, item = entry
        try:
            return name, item, probed_once(item.path)
        except MediaError as error:
            return name, item, error

    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        yield from pool.map(one, found)


def _bucket_of(
    info: MediaInfo, source: SourceConfig, buckets: tuple[Bucket, ...], config: DataConfig
) -> Bucket | str:
    return assign(
        info,
        buckets,
        available=available_frames(info, config.fps, config.skip_frms_num),
        still=info.frames == 1 or source.sampler in STILL_SAMPLERS,
        short=config.short_clips,
    )


def _refuse_if_spoilt(
    named: dict[str, SourceConfig],
    present: set[str],
    bad: list[tuple[str, str]],
    dropped: list[tuple[str, str]],
    config: DataConfig,
) -> None:
    if len(bad) > config.on_bad_sample.skip:
        raise DataError(
            f"{len(bad)} files cannot be read, more than data.params.on_bad_sample.skip "
            f"({config.on_bad_sample.skip}) allows: {_first(bad)}; mend or remove them, or raise the limit."
        )
    for name, source in named.items():
        if name not in present:
            raise DataError(
                f"source '{name}' ({source.path}): not one record can be used: {_first(bad + dropped)}; "
                "mend the files, or change data.params.buckets."
            )


def _first(entries: list[tuple[str, str]], count: int = 3) -> str:
    more = f" and {len(entries) - count} more" if len(entries) > count else ""
    return ", ".join(f"{path} ({reason})" for path, reason in entries[:count]) + more


def _table(rows: list[tuple[str, Item, MediaInfo]]) -> pa.Table:
    columns = {
        "source": [name for name, _, _ in rows],
        **{k: [getattr(item, k) for _, item, _ in rows] for k in ("path", "key", "caption")},
        **{
            k: [getattr(i, k) for _, _, i in rows]
            for k in ("width", "height", "frames", "fps", "duration", "codec")
        },
    }
    return pa.table({k: pa.array(v, type=COLUMNS.field(k).type) for k, v in columns.items()}, schema=COLUMNS)
