"""What every file of a run holds: from the caches if it has not changed, else by probing it."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from queue import LifoQueue
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext import files
from sat_ext.data.guard import Guard
from sat_ext.data.index import probe_cache
from sat_ext.data.index.probe_cache import ENTRIES
from sat_ext.data.probe import probe
from sat_ext.errors import MediaError
from sat_ext.types import MediaInfo

log = logging.getLogger(__name__)

# What a file holds, or why it cannot be read; and whether that stays true until the file changes, unlike
# time-outs, and errors of the network or of permissions.
Outcome = tuple["MediaInfo | MediaError", bool]

# Wraps the iteration over the files to be probed, given their number: a progress bar.
Probing = Callable[[Iterable[Any], int], Iterable[Any]]

_SLICE = 4096  # files handed to the threads at once: a million futures would take 1 GB
_TOGETHER = 16  # files in a message to a process: a round trip takes 0.4 ms, probing an image 0.1 ms
_STATS = 256  # fingerprints in one task of a thread: for a local file, submitting costs more than `stat`
_ROWS = 1 << 16  # outcomes held as Python objects
_SAVE_EVERY = 300.0  # seconds of probing that a killed run may lose


def probe_files(
    paths: Iterable[str],
    *,
    timeout: float,
    look: Callable[[str], MediaInfo] | None = None,
    setting: str = "data.params.on_bad_sample.timeout",
) -> Iterator[Outcome]:
    """What each of `paths` holds, in their order, probed in parallel; `timeout` is for one file, in seconds.

    `look` replaces `probe`, and `setting` says where the user can change the time-out. Every thread has its own
    process (see `Guard`), so a file at which the prober crashes or hangs is a bad file like others.
    """
    workers = min(16, 2 * len(os.sched_getaffinity(0)))
    guards: LifoQueue[Guard[list[Outcome]]] = LifoQueue()  # last in, first out, so few files start few processes
    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        for _ in range(workers):
            guard = Guard(partial(_outcomes, look or probe), timeout=timeout, setting=setting)
            guards.put(stack.enter_context(guard))
        remaining = iter(paths)
        while part := list(islice(remaining, _SLICE)):
            together = min(_TOGETHER, 1 + len(part) // (4 * workers)) if look is None else 1
            runs = [part[i : i + together] for i in range(0, len(part), together)]
            for outcomes in pool.map(partial(_guarded, guards), runs):
                yield from outcomes


def _guarded(guards: LifoQueue[Guard[list[Outcome]]], paths: list[str]) -> list[Outcome]:
    guard = guards.get()
    try:
        return guard(*paths)
    except MediaError as error:  # the time-out, or the end of the process
        if len(paths) == 1:
            return [(error, False)]
    finally:
        guards.put(guard)
    return [outcome for path in paths for outcome in _guarded(guards, [path])]  # which of them was it?


def _outcomes(look: Callable[[str], MediaInfo], *paths: str) -> list[Outcome]:
    return [_outcome(look, path) for path in paths]


def _outcome(look: Callable[[str], MediaInfo], path: str) -> Outcome:
    try:
        return look(path), True
    except MediaError as error:
        cause = error.__cause__
        by_the_system = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)
        return error, not by_the_system and not files.is_url(path)


def read_files(
    paths: pa.Array, sources: Mapping[str, np.ndarray], *, timeout: float, probing: Probing
) -> pa.Table:
    """One row (columns `probe_cache.ENTRIES`) for each of `paths` (large_string, no doubles), in their order.

    `sources` says which of the paths (their numbers, int64) belong to which source; each has its own cache, which
    is updated, also when the run is stopped while probing.
    """
    fingerprints, missing = _fingerprints(paths)
    tables = [ENTRIES.empty_table()]
    where = np.full(len(paths), -1, np.int64)  # the row of each path in `tables`, taken as one
    kept: dict[str, set[int]] = {}  # sizes of a source's caches of which every entry is in use
    for source, own in sources.items():
        caches = probe_cache.load(source)
        kept[source] = set()
        for table in caches:
            rows = probe_cache.find(table, source, paths.take(pa.array(own)), fingerprints.take(pa.array(own)))
            new = (rows >= 0) & (where[own] < 0)
            where[own[new]] = rows[new] + sum(t.num_rows for t in tables)
            tables.append(table)
            if np.count_nonzero(rows >= 0) == table.num_rows:
                kept[source].add(table.num_rows)
    misses = np.flatnonzero(where < 0)
    probed = _Entries()

    def entries(*, save: bool) -> pa.Table:
        """One row for every path; unknown ones have an empty row without a fingerprint."""
        known = pa.concat_tables([*tables, probed.table(), _empty_row()])
        rows = where.copy()
        rows[misses] = np.minimum(np.arange(len(misses)) + sum(t.num_rows for t in tables), known.num_rows - 1)
        table = known.take(pa.array(rows)).set_column(0, ENTRIES.field("path"), paths)
        lasting = pc.not_equal(table["fingerprint"], "").to_numpy()
        for source, own in sources.items() if save else ():
            worth_keeping = own[lasting[own]]
            if len(worth_keeping) not in kept[source]:
                probe_cache.save(source, table.take(pa.array(worth_keeping)))
        return table

    to_probe = [i for i in misses.tolist() if i not in missing]
    found = probe_files((paths[i].as_py() for i in to_probe), timeout=timeout)
    outcomes = iter(probing(found, len(to_probe)))
    saved = time.monotonic()
    try:
        for i in misses.tolist():
            if i in missing:
                probed.add(missing[i], "")
            else:
                outcome, lasting = next(outcomes)
                probed.add(outcome, fingerprints[i].as_py() if lasting else "")
            if time.monotonic() - saved > _SAVE_EVERY:
                entries(save=True)
                saved = time.monotonic()
        next(outcomes, None)  # a progress bar completes when it is asked for one more
    finally:
        table = entries(save=True)
    if len(paths) > len(to_probe):
        log.info("%d files probed, %d known from earlier runs", len(to_probe), len(paths) - len(misses))
    return table


class _Entries:
    """Outcomes as Arrow batches of `ENTRIES`, without paths."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[Any, ...]] = []

    def add(self, found: MediaInfo | MediaError, fingerprint: str) -> None:
        if isinstance(found, MediaError):
            self._rows.append(("", fingerprint, 0, 0, 0, 0.0, 0.0, "", found.reason))
        else:
            size = found.width, found.height, found.frames
            self._rows.append(("", fingerprint, *size, found.fps, found.duration, found.codec, None))
        if len(self._rows) == _ROWS:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self._batches, ENTRIES)

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows)
            arrays = [pa.array(values, field.type) for values, field in zip(columns, ENTRIES)]
            self._batches.append(pa.record_batch(arrays, schema=ENTRIES))
            self._rows = []


def _empty_row() -> pa.Table:
    rows = _Entries()
    rows.add(MediaError("", "not probed yet"), "")
    return rows.table()


def _fingerprints(paths: pa.Array) -> tuple[pa.Array, dict[int, MediaError]]:
    """The fingerprint of each path, and what went wrong where it is empty, by the path's number."""
    parts, missing = [pa.array([], pa.string())], {}
    known: dict[str, str | MediaError] = {}  # of containers, which may have many members
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(paths), _SLICE):
            part = paths[first : first + _SLICE].to_pylist()
            outer = [files.container_of(path) for path in part]
            wanted = [c for c in dict.fromkeys(outer) if c not in known]
            runs = [wanted[i : i + _STATS] for i in range(0, len(wanted), _STATS)]
            found = dict(zip(wanted, (f for run in pool.map(_fingerprints_of, runs) for f in run)))
            found.update((c, known[c]) for c in outer if c in known)
            known.update((c, found[c]) for c, path in zip(outer, part) if c != path)
            texts = []
            for number, (path, container) in enumerate(zip(part, outer), start=first):
                text = found[container]
                if isinstance(text, MediaError):
                    missing[number] = MediaError(path, text.reason)
                texts.append("" if isinstance(text, MediaError) else text)
            parts.append(pa.array(texts, pa.string()))
    return pa.concat_arrays(parts), missing


def _fingerprints_of(paths: list[str]) -> list[str | MediaError]:
    found: list[str | MediaError] = []
    for path in paths:
        try:
            found.append(files.fingerprint(path))
        except MediaError as error:
            found.append(error)
    return found
