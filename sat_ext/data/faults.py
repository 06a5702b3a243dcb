"""Counts unreadable files during a run, by reason and once per rank, until the budget is spent."""

import fcntl
import json
import logging
import os
import re
from collections import Counter
from tempfile import TemporaryFile

import numpy as np

from sat_ext.errors import DataError, MediaError
from sat_ext.types import Bucket

log = logging.getLogger(__name__)

_LISTED = 20  # files in an error, the latest
_MOST_REASON = 300  # letters


class Faults:
    """Counts the files of one rank that could not be read: `skip` different ones are allowed, and `consecutive` in
    a row, which each data worker counts for itself. `known` has path and reason of each by its row in the index.
    """

    def __init__(self, *, skip: int, consecutive: int) -> None:
        self.skip, self.consecutive = skip, consecutive
        self.known: dict[int, tuple[str, str]] = {}
        self._in_a_row = 0
        # One line a fault, in a file that the data workers forked later share; in memory, so that a full disk does
        # not end the run. Not behind a lock, which a killed worker would hold forever: the kernel keeps writes of
        # several processes apart where they append.
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._list = TemporaryFile(buffering=0, dir=memory)  # noqa: SIM115 - it lives as long as this object
        fcntl.fcntl(self._list, fcntl.F_SETFL, os.O_APPEND)
        self._read = 0

    def __contains__(self, row: int) -> bool:
        """Whether the row was found bad, by any worker."""
        return row in self.found()

    def add(self, row: int, error: MediaError) -> None:
        """Note one bad file. Raises `DataError` with the list of files when the budget is spent."""
        self._in_a_row += 1
        if row not in self:
            line = json.dumps([row, error.path, error.reason[:_MOST_REASON]], ensure_ascii=False)
            self._list.write(f"{line}\n".encode(errors="replace"))  # a file's name may not be Unicode
            self._update()
            log.warning("skipped: %s", error)
            count = len(self.known)
            if count > 1 and count & (count - 1) == 0:  # at 2, 4, 8, ...
                log.warning(
                    "%d files skipped so far, of %d that data.params.on_bad_sample allows: %s",
                    count, self.skip, self.summary(),
                )  # fmt: skip
        if len(self.known) > self.skip or self._in_a_row > self.consecutive:
            listed = "; ".join(f"{path}: {reason}" for path, reason in list(self.known.values())[-_LISTED:])
            raise DataError(
                f"{len(self.known)} files could not be read, {self._in_a_row} in a row, more than "
                f"data.params.on_bad_sample allows (skip {self.skip}, consecutive {self.consecutive}), "
                f"{self.summary()}; fix or remove them: {listed}"
            )

    def found(self) -> dict[int, tuple[str, str]]:
        """`known`, with what other workers have found by now."""
        self._update()
        return self.known

    def clear_run(self) -> None:
        """A file was read: start counting `consecutive` from 0."""
        self._in_a_row = 0

    def require_another(self, rows: np.ndarray, source: str, bucket: Bucket) -> None:
        """Raise `DataError` if none of the rows is left to replace a bad one."""
        if all(int(row) in self.known for row in rows):
            path, reason = self.known[int(rows[0])]
            raise DataError(
                f"source '{source}': no file of bucket {bucket} can be read, such as {path} ({reason}); fix "
                "or remove them."
            )

    def summary(self) -> str:
        """How many files there are of each reason, the commonest first; numbers in reasons make no difference."""
        counts = Counter(re.sub(r"\d[\d.,]*", "..", reason) for _, reason in self.known.values())
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())

    def _update(self) -> None:
        """Take over what this and other workers have found since the last call."""
        size = os.fstat(self._list.fileno()).st_size
        if size == self._read:
            return
        # up to the last whole line: another worker's may be half written
        lines = os.pread(self._list.fileno(), size - self._read, self._read).rpartition(b"\n")[0]
        self._read += len(lines) + bool(lines)
        for line in lines.splitlines():
            row, path, reason = json.loads(line)
            self.known.setdefault(row, (path, reason))
