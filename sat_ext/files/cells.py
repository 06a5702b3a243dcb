"""Files that lie in the cells of Parquet tables, read one by one."""

import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

# Bytes read at a time, and bytes kept of cells that were read on the way to another.
_READ_BYTES = 256 << 10
_PASSED_BYTES = 16 << 20


class Cells:
    """One column of files in a Parquet table.

    Parquet is read forwards from the start of a row group. Cells on the way are kept up to a limit, so that
    reading in order costs one pass, and any other order at most a row group a cell. A page is held in memory,
    which is a row group's column if the writer made one page of it."""

    def __init__(self, file: BinaryIO, column: str) -> None:
        self._lock = threading.Lock()
        self._table = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
        field = self._table.schema_arrow.field(column)
        self._leaf = f"{column}.bytes" if pa.types.is_struct(field.type) else column
        groups = self._table.metadata
        sizes = (groups.row_group(number).num_rows for number in range(groups.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))
        self._cells: Iterator[bytes | None] = iter(())
        self._next, self._group = 0, -1
        self._passed: dict[int, bytes | None] = {}  # the oldest first
        self._passed_bytes = 0

    def read(self, row: int) -> bytes | None:
        """The cell in `row`, counted from 0. Raises `IndexError` after the last one, and what Arrow raises."""
        if row >= self._starts[-1]:
            raise IndexError(f"row {row} of a table of {self._starts[-1]} rows")
        with self._lock:
            if row in self._passed:
                return self._passed[row]
            group = bisect_right(self._starts, row) - 1
            if group != self._group or row < self._next:
                self._group, self._next, self._cells = group, self._starts[group], self._iterate(group)
            for data in self._cells:
                at, self._next = self._next, self._next + 1
                self._keep(at, data)
                if at == row:
                    return data
            raise IndexError(f"row {row}: its row group ends before it")

    def _iterate(self, group: int) -> Iterator[bytes | None]:
        for batch in self._table.iter_batches(
            batch_size=1, row_groups=[group], columns=[self._leaf], use_threads=False
        ):
            cell = batch.column(0)[0].as_py()
            yield cell["bytes"] if isinstance(cell, dict) else cell

    def _keep(self, row: int, data: bytes | None) -> None:
        self._passed[row] = data
        self._passed_bytes += len(data or b"")
        while self._passed_bytes > _PASSED_BYTES and len(self._passed) > 1:
            self._passed_bytes -= len(self._passed.pop(next(iter(self._passed))) or b"")
