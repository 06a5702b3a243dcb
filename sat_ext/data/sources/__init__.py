"""Sources to lists of items: paths, captions and what tables say about them. No media file is opened.

docs/data.md has the layouts that a source can be in.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import braceexpand
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.config import INTERNAL
from sat_ext.data.captions import CaptionConfig
from sat_ext.data.columns import to_item
from sat_ext.data.sources.arrow import in_natural_order
from sat_ext.data.sources.folder import read_folder
from sat_ext.data.sources.listing import Notes, list_folder
from sat_ext.data.sources.reach import Reach, check_roots
from sat_ext.data.sources.shards import read_shards
from sat_ext.data.sources.tables import TABLES, read_tables
from sat_ext.data.sources.texts import listed
from sat_ext.data.split import Side
from sat_ext.errors import ConfigError, DataError
from sat_ext.files import is_url, suffix_of
from sat_ext.types import Item, Kind, MixPart, Target

__all__ = ["SourceConfig", "check_roots", "read_batches", "read_source"]

_EMPTY = "a path is empty; give a folder, a table or tar shards."


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One entry of `data.params.sources`.

    `path` is a folder, a table or tar shards, local or a URL (docs/data.md); `name` is for logs and
    the batch, by default the path's; `share` is the part of the samples that come from it, relative to the other
    shares; `sampler` is one of `sat_ext.data.clips`. With a `kind` only its stills or only its clips are used.
    With the `target` base, its samples are trained on what the model predicts without its LoRA.
    `caption` replaces `data.params.caption`. `side` is that of `data.params.held_out`, and `part` that of
    `data.params.mix`.
    """

    path: str
    name: str | None = None
    share: float | None = None
    sampler: str = "random_start"
    kind: Kind | None = None
    target: Target = "data"
    caption: CaptionConfig | None = None
    side: Side | None = field(default=None, metadata=INTERNAL)
    part: MixPart | None = field(default=None, metadata=INTERNAL)

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(f"sources: {_EMPTY}")
        if self.share is not None and not 0 < self.share < float("inf"):
            raise ConfigError(f"sources: share {self.share} of '{self.path}' must be a number above 0.")


def read_source(path: str, **options: Any) -> list[Item]:
    """`read_batches`, as objects."""
    return [to_item(row) for batch in read_batches(path, **options) for row in batch.to_pylist()]


def read_batches(
    path: str,
    *,
    captions_required: bool = True,
    allowed_roots: Sequence[str] = (),
    unread: Counter[str] | None = None,
) -> list[pa.RecordBatch]:
    """Every item of a source (`ITEM_COLUMNS`), in natural order of their keys (clip2 before clip10).

    Links and names must stay in the source or in `allowed_roots`. What is odd about a source but no reason to stop
    is logged once, with a count. Raises `DataError` if there is nothing to read, if a caption is missing, and for
    an invalid value or a name that leads out of the source. Without `captions_required`, a file without a caption
    is an item with empty `captions`. `unread` counts files that may be media but are not read, by suffix.
    """
    if not path:  # such as an unset variable of a shell; it would be the folder of the process
        raise DataError(_EMPTY)
    notes = Notes(captions_required=captions_required, reach=Reach(allowed_roots))
    try:
        batches = in_natural_order(list(_read(path, notes)))
        for batch in batches:
            if pc.min(pc.binary_length(batch["captions"].flatten())).as_py() == 0:
                for key, captions in zip(batch["key"].to_pylist(), batch["captions"].to_pylist()):
                    if captions and not any(captions):
                        notes.add("empty captions, to be trained without one", key)
    finally:
        notes.log(path)
    if unread is not None:
        unread.update(notes.unread)
    return batches


def _read(path: str, notes: Notes) -> Iterable[pa.RecordBatch]:
    path = re.sub("^(file|local)://", "", path)  # or `Reach` would not apply to its rows
    local = not is_url(path)
    if local:
        path = os.path.normpath(os.path.expanduser(path))
    if "{" in path and not (local and os.path.exists(path)):
        return _read_files(path, _in_range(path), notes)
    if local and os.path.isdir(path):
        notes.reach.add(path)
        return read_folder(list_folder(path, notes), notes)
    if os.path.exists(path) if local else suffix_of(path):
        return _read_files(path, [path], notes)
    if not local and len((folder := list_folder(path, notes)).names):
        return read_folder(folder, notes)
    raise DataError(f"{path}: no such file or folder; check sources or train_data.")


def _read_files(source: str, paths: Sequence[str], notes: Notes) -> Iterable[pa.RecordBatch]:
    """Tars or tables: one file, or those of a brace range."""
    for folder in {os.path.dirname(p) for p in paths}:
        notes.reach.add(folder)
    common = os.path.commonprefix([p.rpartition("/")[0] + "/" for p in paths]).rpartition("/")[0] + "/"
    names = [p.removeprefix(common) for p in paths]
    if is_url(source):
        names = [name.partition("?")[0] for name in names]  # a signature, which changes
    suffixes = sorted({suffix_of(p) for p in paths})
    if suffixes == [".tar"]:
        return read_shards(list(zip(paths, names)), notes)
    if len(suffixes) == 1 and suffixes[0] in TABLES:
        # The keys of one table's rows have no prefix; those of several tables could collide.
        return read_tables([(p, "" if p == source else f"{n}/") for p, n in zip(paths, names)], notes)
    raise DataError(
        f"{source}: {' and '.join(map(repr, suffixes))} is not a kind of source; give a folder, a table "
        f"{' or '.join(TABLES)}, or .tar."
    )


def _in_range(path: str) -> list[str]:
    """The files of a brace range: `{0000..0009}` or `{a,b}`."""
    try:
        paths = list(braceexpand.braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: not a range of files ({error}); write it as in {{0000..0009}}.tar.") from error
    absent = [p for p in paths if not is_url(p) and not os.path.exists(p)]
    if absent:
        missing = f"{len(absent)} of its {len(paths)} files are missing ({listed(absent)})"
        raise DataError(f"{path}: {missing}; fix the range.")
    return paths
