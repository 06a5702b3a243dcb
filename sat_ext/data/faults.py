"""Counts unreadable files during a run, by reason and once per rank, until the budget is spent."""

import logging
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable
from multiprocessing import get_context

import numpy as np

from sat_ext.errors import DataError, MediaError
from sat_ext.types import Bucket

log = logging.getLogger(__name__)

_COUNT = struct.Struct("<q")
_ENTRY = struct.Struct("<qHH")  # row, bytes of the path, bytes of the reason
_ENTRY_SIZE = 1024
_MOST = 1 << 20  # entries, 1 GiB; files past it are not remembered
_LISTED = 20  # files in an error, the latest
_PATIENCE = 10.0  # seconds for the lock, which a killed worker may hold forever


class Faults:
    """Counts the files of one rank that could not be read; its data workers share one list.

    The list is in memory shared with processes forked later, so make it before the workers. It holds `skip`
    different rows of the index and the one that ends the run. `consecutive` is counted in each worker.
    """

    def __init__(self, *, skip: int, consecutive: int, rows: int) -> None:
        self.skip, self.consecutive = skip, consecutive
        self._room = min(skip, rows, _MOST) + 1
        self._list = mmap.mmap(-1, _COUNT.size + self._room * _ENTRY_SIZE)
        self._lock = get_context("fork").Lock()
        self._known: dict[int, tuple[str, str]] = {}  # by row, path and reason: this process's copy of the list
        self._in_a_row = 0

    def __contains__(self, row: int) -> bool:
        """Whether the row was found bad, by any worker."""
        return row in self.known()

    def known(self) -> dict[int, tuple[str, str]]:
        """Path and reason of every bad row, in the order found."""
        for number in range(len(self._known), _COUNT.unpack_from(self._list)[0]):
            at = _COUNT.size + number * _ENTRY_SIZE
            row, path, reason = _ENTRY.unpack_from(self._list, at)
            text = self._list[at + _ENTRY.size : at + _ENTRY.size + path + reason]
            self._known[row] = text[:path].decode(errors="replace"), text[path:].decode(errors="replace")
        return self._known

    def add(self, row: int, error: MediaError) -> None:
        """Note one bad file. Raises `DataError` with the list of files when the budget is spent."""
        self._in_a_row += 1
        held = self._lock.acquire(timeout=_PATIENCE)
        try:
            known = self.known()
            new = row not in known and len(known) < self._room
            if new:
                self._append(row, error)
        finally:
            if held:
                self._lock.release()
        known = self.known()
        if new:
            log.warning("skipped: %s", error)
            if len(known) > 1 and len(known) & (len(known) - 1) == 0:  # at 2, 4, 8, ...
                log.warning(
                    "%d files skipped so far, of %d that data.params.on_bad_sample allows: %s",
                    len(known), self.skip, self.summary(),
                )  # fmt: skip
        if len(known) > self.skip or self._in_a_row > self.consecutive:
            raise self._spent()

    def clear_run(self) -> None:
        """A file was read: start counting `consecutive` from 0."""
        self._in_a_row = 0

    def require_another(self, rows: np.ndarray, source: str, bucket: Bucket) -> None:
        """Raise `DataError` if none of the rows is left to replace a bad one."""
        known = self.known()
        if all(int(row) in known for row in rows):
            path, reason = known[int(rows[0])]
            raise DataError(
                f"source '{source}': no file of bucket {bucket} can be read, such as {path} ({reason}); fix "
                "or remove them."
            )

    def summary(self) -> str:
        """How many files there are of each reason, the commonest first."""
        return by_reason(reason for _, reason in self.known().values())

    def _append(self, row: int, error: MediaError) -> None:
        number = len(self._known)
        at = _COUNT.size + number * _ENTRY_SIZE
        path, reason = error.path.encode(errors="surrogateescape"), error.reason.encode(errors="replace")[:300]
        path = path[-(_ENTRY_SIZE - _ENTRY.size - len(reason)) :]  # the end of a path says more
        _ENTRY.pack_into(self._list, at, row, len(path), len(reason))
        self._list[at + _ENTRY.size : at + _ENTRY.size + len(path) + len(reason)] = path + reason
        _COUNT.pack_into(self._list, 0, number + 1)  # last, because others read without the lock

    def _spent(self) -> DataError:
        known = self.known()
        listed = "; ".join(f"{path}: {reason}" for path, reason in list(known.values())[-_LISTED:])
        return DataError(
            f"{len(known)} files could not be read, {self._in_a_row} in a row, more than "
            f"data.params.on_bad_sample allows (skip {self.skip}, consecutive {self.consecutive}), "
            f"{self.summary()}; fix or remove them: {listed}"
        )


def by_reason(reasons: Iterable[str]) -> str:
    """How often each reason occurs, the commonest first; reasons that differ only in numbers are merged.

    >>> by_reason(["truncated at byte 10 of 20", "no such file", "truncated at byte 7 of 9"])
    '2 truncated at byte .. of .., 1 no such file'
    """
    counts = Counter(re.sub(r"\d[\d.,]*", "..", reason) for reason in reasons)
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
