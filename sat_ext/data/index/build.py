"""The index of a run: what its sources have, by source and bucket."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from sat_ext.data.captions import CaptionConfig, with_captions
from sat_ext.data.columns import FILE_COLUMNS, ITEM_COLUMNS, to_info, to_item
from sat_ext.data.index.place import Placed, place_rows, placer, visits_by_weight
from sat_ext.data.index.probing import Probe, Probing, probe_files, read_files
from sat_ext.data.mix import shares_of
from sat_ext.data.params import DataConfig, name_sources
from sat_ext.data.sources import SourceConfig, read_batches
from sat_ext.data.split import Side, split
from sat_ext.errors import DataError
from sat_ext.types import Bucket, Item, MediaInfo

log = logging.getLogger(__name__)

COLUMNS = pa.schema([("source", pa.dictionary(pa.int16(), pa.string())), *ITEM_COLUMNS, *FILE_COLUMNS])

_ROWS = 4096  # that are Python objects at a time
MOST_VISITS = 1000  # of one record in an epoch: each takes bytes in the index


@dataclass(frozen=True, kw_only=True)
class Group:
    """The records of one source that fall into one bucket.

    `rows` (uint32, into `Index.table`) has an entry for each record: a row occurs once for each of its windows
    (sampler `all_windows`), times its visits (`visits_by_weight`). `windows` (uint16 or uint32) is the window of
    each record; None if every row has one.
    """

    source: str
    bucket: Bucket
    rows: np.ndarray
    windows: np.ndarray | None = None

    def window(self, record: int) -> int:
        """Which window of its clip a record is."""
        return 0 if self.windows is None else int(self.windows[record])


@dataclass(frozen=True, kw_only=True)
class Index:
    """`table` holds every row that can be trained on; `groups` sorts them by source and bucket.

    `samplers` and `shares` are by source name; the default share is the number of the source's records.
    `by_base` names the sources of the target "base". `bad` are files, or parts of files, that cannot be read, as
    (path, reason); `left_out` has the columns path and reason of those that fit no bucket or have the weight 0,
    which may be most. `made` is the time (`time.time`) of indexing. `unread` counts files that may be media but
    are not read, by suffix.
    """

    table: pa.Table
    groups: tuple[Group, ...]
    samplers: dict[str, str]
    shares: dict[str, float]
    bad: tuple[tuple[str, str], ...]
    left_out: pa.Table
    made: float
    unread: Mapping[str, int] = field(default_factory=dict)
    by_base: frozenset[str] = frozenset()

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """`left_out` as (path, reason)."""
        return _pairs(self.left_out)

    def item(self, row: int) -> tuple[Item, MediaInfo]:
        """The item of one row, and what its whole file holds."""
        item, info, _ = next(self.items(np.array([row])))
        return item, info

    def items(self, rows: np.ndarray) -> Iterator[tuple[Item, MediaInfo, str]]:
        """As `item`, of rows in rising order, with the fingerprints of their files."""
        for part in (rows[first : first + _ROWS].astype(np.int64) for first in range(0, len(rows), _ROWS)):
            # of a slice: Arrow would first join all of the table
            table = self.table.slice(part[0], part[-1] - part[0] + 1)
            for values in table.take(part - part[0]).to_pylist():
                yield to_item(values), to_info(values), values["fingerprint"]

    def summary(self) -> str:
        """One line for the log: records by source and bucket, and what was left out."""
        parts = [f"{g.source} {g.bucket}: {len(g.rows)}" for g in self.groups]
        total = sum(len(g.rows) for g in self.groups)
        left_out = f"{len(self.bad)} unreadable, {self.left_out.num_rows} in no bucket"
        if self.unread:
            left_out += f", {sum(self.unread.values())} of endings that are not read ({', '.join(self.unread)})"
        return f"{total} records ({', '.join(parts)}); {left_out}"


def build_index(
    sources: Sequence[SourceConfig],
    config: DataConfig,
    *,
    probing: Probing = lambda outcomes, total: outcomes,
    probe: Probe = probe_files,
) -> Index:
    """Read and probe `sources`, and put each record into its bucket, in the order of the sources' items.

    Files that have not changed since an earlier run are not probed again (see `probe_cache`). `probe` probes the
    others, and `probing` wraps the iteration over them. Raises `DataError` if a source is empty, if more files are
    unreadable than `on_bad_sample.skip` allows, if no record of a source fits a bucket, or if weights are too far
    apart.
    """
    made = time.time()
    named = name_sources(tuple(sources), "sources")
    paths = dict.fromkeys(source.path for source in named.values())  # several sources may read one folder
    unread: Counter[str] = Counter()
    roots = config.allowed_roots
    items = {p: read_batches(p, allowed_roots=roots, unread=unread) for p in paths}
    side = next(iter(named.values())).side  # of all, as they are one list
    if side is not None and config.held_out is not None:
        items = _one_side(items, config.held_out, side)
        named = {name: s for name, s in named.items() if s.path in items}
    infos = infos_of(items, config, probing, probe)
    buckets = config.make_buckets()
    placed = {
        name: place_rows(items[s.path], infos[s.path], placer(s, buckets, config)) for name, s in named.items()
    }
    bad = tuple(dict.fromkeys(entry for found in placed.values() for entry in found.bad))  # each file once
    for path, reason in bad:
        log.warning("left out, fix or remove it: %s: %s", path, reason)
    # a source need not have every part of a mix, or anything held out
    optional = {n for n, s in named.items() if (s.part or s.side == "held_out") and not len(placed[n].bucket)}
    if len(optional) < len(named):
        named = {name: s for name, s in named.items() if name not in optional}
    _refuse_if_spoilt(named, placed, bad, config)
    placed = {name: placed[name] for name in named}
    names = pa.array(list(named))
    batches: list[pa.RecordBatch] = []
    groups: list[Group] = []
    for number, (name, found) in enumerate(placed.items()):
        groups += _groups(name, found, buckets, first_row=sum(batch.num_rows for batch in batches))
        rule = named[name].caption or config.caption
        for batch in found.batches:
            batch = batch if rule == CaptionConfig() else with_captions(batch, rule)
            source_column = pa.DictionaryArray.from_arrays(np.full(batch.num_rows, number, np.int16), names)
            batches.append(pa.record_batch([source_column, *batch.columns], schema=COLUMNS))
    counts = {name: sum(len(g.rows) for g in groups if g.source == name) for name in named}
    return Index(
        table=pa.Table.from_batches(batches, COLUMNS),
        groups=tuple(groups),
        samplers={name: s.sampler for name, s in named.items()},
        shares=shares_of(named, counts, config.mix),
        bad=bad,
        left_out=pa.concat_tables(found.dropped for found in placed.values()),
        unread=dict(sorted(unread.items())),
        made=made,
        by_base=frozenset(name for name, s in named.items() if s.target == "base"),
    )


def _one_side(items: dict[str, list[pa.RecordBatch]], held_out: float | int, side: Side) -> dict[str, Any]:
    """The items on one side of the split, and only the sources that have some."""
    found = {}
    names = {
        path: [pair for batch in own for pair in zip(batch["key"].to_pylist(), batch["path"].to_pylist())]
        for path, own in items.items()
    }
    for path, kept in split(names, held_out, side).items():
        table = pa.Table.from_batches(items[path]).filter(pa.array(kept))
        if table.num_rows:
            found[path] = table.to_batches()
    return found


def infos_of(
    items: dict[str, list[pa.RecordBatch]], config: DataConfig, probing: Probing, probe: Probe
) -> dict[str, list[pa.Table]]:
    """For each batch of items, by source path: `FILE_COLUMNS` and `reason` of its files."""
    columns = [batch["path"].cast(pa.large_string()) for batches in items.values() for batch in batches]
    # in one piece, as making one dictionary of many takes a minute for a million files
    coded = pa.chunked_array(columns).combine_chunks().dictionary_encode()
    ends = np.cumsum([len(column) for column in columns])
    codes = iter(np.split(coded.indices.to_numpy(), ends[:-1]))
    by_source = {path: [next(codes) for _ in batches] for path, batches in items.items()}
    members = {path: np.unique(np.concatenate(own)) for path, own in by_source.items()}
    unique = coded.dictionary
    entries = read_files(unique, members, timeout=config.on_bad_sample.timeout, probing=probing, probe=probe)
    entries = entries.select([*FILE_COLUMNS.names, "reason"]).combine_chunks()  # or every `take` would
    return {path: [entries.take(part) for part in own] for path, own in by_source.items()}


def _groups(name: str, found: Placed, buckets: Sequence[Bucket], first_row: int) -> list[Group]:
    """The records of a source by bucket; its rows in the index's table start at `first_row`."""
    visits = visits_by_weight(found.weight)
    if visits.max() > MOST_VISITS:
        raise DataError(
            f"source '{name}': its weights reach from {found.weight.min():g} to {found.weight.max():g}, so that a "
            f"record would come {visits.max()} times in an epoch (at most {MOST_VISITS}); bring them closer "
            "together, or make two sources of it and give them shares."
        )
    groups = []
    for number in np.unique(found.bucket):
        rows = np.flatnonzero(found.bucket == number)
        rows = np.repeat(rows, visits[rows])
        windows, which = found.windows[rows], None
        if windows.max() > 1:
            ends = np.cumsum(windows)  # `which` counts from 0 within each row's windows
            which = np.arange(ends[-1]) - np.repeat(ends - windows, windows)
            which = which.astype(np.uint16 if windows.max() <= 1 << 16 else np.uint32)
            rows = np.repeat(rows, windows)
        records = (rows + first_row).astype(np.uint32)
        groups.append(Group(source=name, bucket=buckets[number], rows=records, windows=which))
    return groups


def _refuse_if_spoilt(
    named: dict[str, SourceConfig], placed: dict[str, Placed], bad: tuple[tuple[str, str], ...], config: DataConfig
) -> None:
    if len(bad) > config.on_bad_sample.skip:
        raise DataError(
            f"{len(bad)} files cannot be read, more than data.params.on_bad_sample.skip "
            f"({config.on_bad_sample.skip}) allows: {_first(bad)}; fix or remove them, or raise the limit."
        )
    for name, source in named.items():
        if not len(placed[name].bucket):
            left_out = [*placed[name].bad, *_pairs(placed[name].dropped)]
            raise DataError(
                f"source '{name}' ({source.path}): not one record can be used: {_first(left_out)}; "
                "fix the files, or change data.params.buckets."
            )


def _pairs(left_out: pa.Table) -> list[tuple[str, str]]:
    return list(zip(*(left_out[name].to_pylist() for name in left_out.column_names)))


def _first(entries: Sequence[tuple[str, str]], count: int = 3) -> str:
    more = f" and {len(entries) - count} more" if len(entries) > count else ""
    return ", ".join(f"{path} ({reason})" for path, reason in entries[:count]) + more
