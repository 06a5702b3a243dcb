"""What every file of a run holds: from the caches if it has not changed, else by probing it."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import chain, islice
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
# timeouts, and errors of the network or of permissions.
Outcome = tuple["MediaInfo | MediaError", bool]

Probe = Callable[..., Iterator[Outcome]]  # `probe_files`, or another way to do as it does

# Wraps the iteration over the probed files, given their number: a progress bar.
Probing = Callable[[Iterable[Any], int], Iterable[Any]]

_SLICE = 4096  # files handed to the threads at once: a million futures would take 1 GB
_TOGETHER = 16  # files in a message to a process: a round trip takes 0.4 ms, probing an image 0.1 ms
_STATS = 2048  # fingerprints in one task of a thread: for a local file, submitting costs more than `stat`
_QUICK = 2e-5  # seconds for a fingerprint; over a network it is ten times as much
_ROWS = 1 << 14  # outcomes held as Python objects
_SAVE_EVERY = 300.0  # seconds of probing that a killed run may lose


def probe_files(
    paths: Iterable[str],
    *,
    timeout: float,
    look: Callable[[str], Any] | None = None,
    setting: str = "data.params.on_bad_sample.timeout",
) -> Iterator[Outcome]:
    """What each of `paths` holds, in their order, probed in parallel; `timeout` is for one file, in seconds.

    `look` replaces `probe`, and `setting` says where the user can change the timeout. Every thread has its own
    process (see `Guard`), so a file that crashes or hangs the prober is a bad file like others.
    """
    workers = min(16, 2 * len(os.sched_getaffinity(0)))
    own = threading.local()

    def make_guard() -> None:
        guard = Guard(partial(_outcomes, look or probe), timeout=timeout, setting=setting)
        own.guard = stack.enter_context(guard)

    # The pool starts a thread only when all others are busy, so few files start few processes.
    with ExitStack() as stack, ThreadPoolExecutor(workers, initializer=make_guard) as pool:
        remaining = iter(paths)
        while part := list(islice(remaining, _SLICE)):
            together = min(_TOGETHER, 1 + len(part) // (4 * workers)) if look is None else 1
            runs = [part[i : i + together] for i in range(0, len(part), together)]
            for outcomes in pool.map(lambda run: _guarded(own.guard, run), runs):
                yield from outcomes


def _guarded(guard: Guard[list[Outcome]], paths: list[str]) -> list[Outcome]:
    try:
        return guard(*paths)
    except MediaError as error:  # the timeout, or the end of the process
        if len(paths) == 1:
            return [(error, False)]
    return [outcome for path in paths for outcome in _guarded(guard, [path])]  # which of them was it?


def _outcomes(look: Callable[[str], Any], *paths: str) -> list[Outcome]:
    return [_outcome(look, path) for path in paths]


def _outcome(look: Callable[[str], Any], path: str) -> Outcome:
    try:
        return look(path), True
    except MediaError as error:
        cause = error.__cause__
        by_the_system = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)
        return error, not by_the_system and not files.is_url(path)


def read_files(
    paths: pa.Array,
    sources: Mapping[str, np.ndarray],
    *,
    timeout: float,
    probing: Probing,
    probe: Probe = probe_files,
) -> pa.Table:
    """One row (columns `probe_cache.ENTRIES`) for each of `paths` (large_string, no duplicates), in their order.

    `sources` says which of the paths (their numbers) belong to which source. Each source has its own cache, which
    is updated, even if the run is stopped while probing.
    """
    fingerprints, missing = _fingerprints(paths)
    tables: list[pa.Table] = []
    where = np.full(len(paths), -1, np.int64)  # the row of each path in `tables`, taken as one; -1: not yet known
    complete: dict[str, int] = {}  # entries of a source's cache, if all of them are in use
    for source, own in sources.items():
        table = probe_cache.load(source)
        rows = probe_cache.find(table, source, paths.take(own), fingerprints.take(own))
        new = (rows >= 0) & (where[own] < 0)
        where[own[new]] = rows[new] + sum(t.num_rows for t in tables)
        tables.append(table)
        if np.count_nonzero(rows >= 0) == table.num_rows:
            complete[source] = table.num_rows
    unknown = np.flatnonzero(where < 0).tolist()
    to_probe = [i for i in unknown if i not in missing]
    probed = {i: _entry(error, "") for i, error in missing.items()}  # not in `tables` yet

    def collect() -> None:
        where[list(probed)] = np.arange(len(probed)) + sum(t.num_rows for t in tables)
        tables.append(pa.Table.from_pylist(list(probed.values()), ENTRIES))
        probed.clear()

    def save() -> pa.Table:
        """Update the caches; returns everything known."""
        collect()
        known = pa.concat_tables(tables)
        for source, own in sources.items():
            own = own[where[own] >= 0]
            table = known.take(where[own]).set_column(0, ENTRIES.field("path"), paths.take(own))
            table = table.filter(pc.not_equal(table["fingerprint"], ""))
            if table.num_rows != complete.get(source):  # else another file would be written with the same content
                probe_cache.save(source, table)
        return known

    saved = time.monotonic()
    found = probing(probe((paths[i].as_py() for i in to_probe), timeout=timeout), len(to_probe))
    try:
        for (outcome, lasting), i in zip(found, to_probe):  # `found` first: a progress bar must see its end
            probed[i] = _entry(outcome, fingerprints[i].as_py() if lasting else "")
            if len(probed) == _ROWS:
                collect()
            if time.monotonic() - saved > _SAVE_EVERY:
                save()
                saved = time.monotonic()
    finally:
        known = save()
    if len(paths) > len(to_probe):
        log.info("%d files probed, %d known from earlier runs", len(to_probe), len(paths) - len(unknown))
    return known.take(where).set_column(0, ENTRIES.field("path"), paths)


_NOTHING = MediaInfo(width=0, height=0, frames=0, fps=0.0, duration=0.0, codec="")


def _entry(found: MediaInfo | MediaError, fingerprint: str) -> dict[str, Any]:
    """A row of `ENTRIES` without its path. One without a fingerprint is not kept for the next run."""
    reason = found.reason if isinstance(found, MediaError) else None
    info = _NOTHING if isinstance(found, MediaError) else found
    return {"fingerprint": fingerprint, **asdict(info), "reason": reason}


def _fingerprints(paths: pa.Array) -> tuple[pa.Array, dict[int, MediaError]]:
    """The fingerprint of each path, empty for those that cannot be read, and the errors of these by number."""
    # A container's members follow each other, so few containers need to be remembered.
    fingerprint_of = lru_cache(maxsize=1024)(_fingerprint)

    are_plain = not pc.any(pc.match_substring_regex(paths, "#|://")).as_py()
    step = _STATS if are_plain else _STATS // 8

    def run(first: int) -> tuple[pa.Array, dict[int, MediaError]]:
        part = paths[first : first + step]
        if are_plain:
            sizes, times = files.states(part.to_pylist())
            if pc.min(sizes).as_py() > 0:
                return pc.binary_join_element_wise(sizes.cast(pa.string()), times.cast(pa.string()), "-"), {}
        found = [fingerprint_of(container) for container in map(files.container_of, part.to_pylist())]
        errors = {first + n: f for n, f in enumerate(found) if isinstance(f, MediaError)}
        return pa.array([f if isinstance(f, str) else "" for f in found], pa.string()), errors

    parts, missing = [pa.array([], pa.string())], {}
    firsts, began = range(0, len(paths), step), time.perf_counter()
    head = [run(first) for first in firsts[:1]]
    # threads would only wait for each other where the system has the answers in memory
    is_quick = time.perf_counter() - began < step * _QUICK
    with ThreadPoolExecutor(16) as pool:
        for part, errors in chain(head, (map if is_quick else pool.map)(run, firsts[1:])):
            parts.append(part)
            missing.update(errors)
    return pa.concat_arrays(parts), missing


def _fingerprint(path: str) -> str | MediaError:
    try:
        return files.fingerprint(path)
    except MediaError as error:
        return error
