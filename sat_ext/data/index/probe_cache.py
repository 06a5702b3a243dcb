"""What files held when they were last probed, kept between runs: one Arrow file for each source.

It lies beside the data (`.sat_ext/index.arrow` in the source's folder) or, if that cannot be written, under
`$SAT_EXT_CACHE` (by default `~/.cache/sat_ext`), named after the source's path. An entry is valid while the file's
fingerprint is the same. Paths are relative to the source, so a data set may be moved or mounted elsewhere.

A checksum follows the Arrow file, except in those of earlier versions.
"""

import hashlib
import logging
import os
import stat
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.data.columns import INFO_COLUMNS
from sat_ext.files import is_url
from sat_ext.files.atomic import cache_folder, written_aside
from sat_ext.media import image_formats

log = logging.getLogger(__name__)

# Raise it when `probe` describes a file differently than before: all files are then probed again.
PROBER_VERSION = 2

ENTRIES = pa.schema(
    [("path", pa.large_string()), ("fingerprint", pa.string()), *INFO_COLUMNS, ("reason", pa.string())]
)  # `reason` is why a file cannot be read; the columns before it are then zero

_ROWS = 1 << 20  # in one batch: Arrow's strings end at 2 GiB
_TRAILER = struct.Struct("<12sI")  # after the Arrow file: a mark, and the CRC-32 of everything before
_MARK = b"sat_ext CRC:"


def load(source: str) -> pa.Table:
    """The entries (`ENTRIES`) kept for `source`, a `SourceConfig`'s path or URL; mapped into memory, not read.

    A broken cache is skipped with a warning. Entries of another prober do not count.
    """
    # Whoever may write beside the data does, so either cache may be the newer one.
    newest_first = sorted(_places(source), key=lambda p: os.path.exists(p) and os.path.getmtime(p), reverse=True)
    tables = (_load(place) for place in newest_first)
    return next((table for table in tables if table is not None), ENTRIES.empty_table())


def find(table: pa.Table, source: str, paths: pa.Array, fingerprints: pa.Array) -> np.ndarray:
    """The row (int64) of `table` for each of `paths` as it is now, -1 if there is none."""
    rows = pc.index_in(_relative(paths, source), value_set=table["path"].combine_chunks())
    same = pc.equal(table["fingerprint"].combine_chunks().take(rows), fingerprints)
    return pc.if_else(pc.fill_null(same, False), rows.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)


def save(source: str, table: pa.Table) -> None:
    """Keep `table` (columns of `ENTRIES`) for `source`, in the first place that can be written."""
    table = table.set_column(0, ENTRIES.field("path"), _relative(table["path"], source))
    kept = {"prober": str(PROBER_VERSION), "libraries": _libraries(), "source": source}
    table = table.cast(ENTRIES).replace_schema_metadata(kept)
    for place in _places(source):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(place, shared=True) as draft:  # other runs of this data may write it now
                with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table, max_chunksize=_ROWS)
                with pa.memory_map(str(draft)) as written:
                    trailer = _TRAILER.pack(_MARK, zlib.crc32(written.read_buffer()))
                with draft.open("ab") as file:
                    file.write(trailer)
            return
        except OSError as error:
            problem = error
    log.warning(
        "%s: what its files hold cannot be kept for the next run (%s); set SAT_EXT_CACHE to a folder that can "
        "be written.", source, problem,
    )  # fmt: skip


def _libraries() -> str:
    return f"av {av.__version__}, Pillow {PIL.__version__}, {' '.join(image_formats())}"


def _places(source: str) -> tuple[Path, ...]:
    """Where the cache of `source` may be, best first."""
    name = source if is_url(source) else os.path.abspath(os.path.expanduser(source))
    own = cache_folder() / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.arrow"
    beside = Path(name, ".sat_ext")
    # a link could lead anywhere, and a data set's content is not trusted
    return (beside / "index.arrow", own) if os.path.isdir(name) and not beside.is_symlink() else (own,)


def _load(place: Path) -> pa.Table | None:
    try:
        if not stat.S_ISREG(place.stat().st_mode):  # opening a pipe could block forever
            raise ValueError("not a regular file")
        with pa.memory_map(str(place)) as file:
            content = _without_trailer(file.read_buffer())
            table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        _require_sound(table)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, pa.ArrowException, ValueError) as error:
        log.warning("%s: not a readable cache (%s); all files are probed again.", place, error)
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(b"prober") != str(PROBER_VERSION).encode():
        return None
    # Another version of a library, or a new format, may read what could not be read.
    if metadata.get(b"libraries") != _libraries().encode():
        return table.filter(pc.is_null(table["reason"]))
    return table


def _without_trailer(content: pa.Buffer) -> pa.Buffer:
    """The Arrow file. Raises `ValueError` if it is not what was written."""
    size = content.size - _TRAILER.size
    if size < 0 or content[size:].to_pybytes()[: len(_MARK)] != _MARK:
        return content
    _, checksum = _TRAILER.unpack(content[size:])
    if zlib.crc32(content[:size]) != checksum:
        raise ValueError("its checksum does not match")
    return content[:size]


def _require_sound(table: pa.Table) -> None:
    """Raise `ValueError` for a table with invalid values: Arrow itself does not check offsets."""
    if not table.schema.equals(ENTRIES):
        raise ValueError("its columns are others")
    table.validate(full=True)
    good = table.filter(pc.is_null(table["reason"]))
    least = {"width": 1, "height": 1, "frames": 1, "fps": 0, "duration": 0}
    measures = ((good[name].to_numpy(), low) for name, low in least.items())
    if any(table[name].null_count for name in ENTRIES.names if name != "reason") or not all(
        (np.isfinite(values) & (values >= low)).all() for values, low in measures
    ):
        raise ValueError("it has values that no file can have")


def _relative(paths: pa.Array | pa.ChunkedArray, source: str) -> pa.Array | pa.ChunkedArray:
    """Paths below the source's folder (or the table's) relative to it; others unchanged."""
    root = source if is_url(source) else os.path.normpath(os.path.expanduser(source))
    if not os.path.isdir(root):
        root = os.path.dirname(root)
    if not root.strip("/"):
        return paths
    root = os.path.join(root, "")
    inside = pc.starts_with(paths, root)
    return pc.if_else(inside, pc.utf8_slice_codeunits(paths, start=len(root)), paths)
