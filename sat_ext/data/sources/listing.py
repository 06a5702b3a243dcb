"""What a folder holds, on a disk or behind a URL, and the captions in it."""

import codecs
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.data.columns import ROWS
from sat_ext.data.sources import kept
from sat_ext.data.sources.reach import Reach, leads_out
from sat_ext.data.sources.texts import MAX_CAPTION_BYTES, encoding_of, is_text, listed, one_line, open_text
from sat_ext.errors import DataError, MediaError
from sat_ext.files import is_url, states
from sat_ext.files.ranged import filesystem, retried
from sat_ext.types import MEDIA_EXTENSIONS, OTHER_EXTENSIONS

log = logging.getLogger(__name__)

_AT_ONCE = 256  # small files that are fetched together from a server
_KEPT = pa.schema(
    [("name", pa.large_string()), ("size", pa.int64()), ("changed", pa.int64()), ("text", pa.large_string())]
)
_KEPT_VERSION = "1"  # raise it when a caption is read in another way than before


def is_media(name: str) -> bool:
    """Whether a file's name is that of an image or a video."""
    return os.path.splitext(name)[1].lower() in MEDIA_EXTENSIONS


class Notes:
    """What is odd about a source but no reason to stop: one warning for each kind of it, with a count.

    `reach` limits which names of the source may be opened; `unread` counts files that may be media but are not
    read, by suffix. Both travel with the notes because every reader of a source needs all three.
    """

    def __init__(self, *, captions_required: bool, reach: Reach) -> None:
        self.captions_required, self.reach = captions_required, reach
        self.unread: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}  # the first few
        self._lock = threading.Lock()  # shards are read in threads

    def add(self, what: str, name: str) -> None:
        """`name` is one of `what`, such as "empty captions"."""
        with self._lock:
            self._counts[what] += 1
            if self._counts[what] <= 3:
                self._names.setdefault(what, []).append(name)

    def take(self, other: "Notes") -> bool:
        """Add the notes of a part of the source; whether there are any."""
        with self._lock:
            self._counts.update(other._counts)
            self.unread.update(other.unread)
            for what, names in other._names.items():
                self._names[what] = [*self._names.get(what, ()), *names][:3]
        return bool(other._counts)

    def leave_out(self, name: str) -> None:
        """Count a file that may be media but is not read."""
        suffix = os.path.splitext(name)[1].lower()
        if suffix and suffix not in OTHER_EXTENSIONS:
            with self._lock:
                self.unread[suffix] += 1
            self.add(f"files ending in {suffix} are not read and were left out; convert or rename them", name)

    def decode(self, data: bytes, name: str) -> str:
        """The bytes of the caption `name` as text."""
        if len(data) > MAX_CAPTION_BYTES:
            self.add("captions cut after 1 MiB", name)
            data = data[:MAX_CAPTION_BYTES]
        decoder = codecs.getincrementaldecoder(encoding_of(data, name))
        is_whole = len(data) < MAX_CAPTION_BYTES  # a cut may split a letter
        try:
            return decoder().decode(data, is_whole)
        except UnicodeDecodeError:
            self.add("captions that are not UTF-8, their bad bytes replaced; save them as UTF-8", name)
            return decoder("replace").decode(data, is_whole)

    def log(self, source: str) -> None:
        """One warning for each kind."""
        for what, count in self._counts.items():
            log.warning("%s: %s: %d (%s)", source, what, count, listed(self._names[what], count))


@dataclass(frozen=True, slots=True)
class Folder:
    """Every file below `root` but hidden ones: `names` (large_string) are relative to it, with forward slashes.

    `links`: where links among them lead out of the source; these may not be opened.
    """

    root: str
    names: pa.Array
    links: Mapping[str, str] = field(default_factory=dict)

    def location(self, name: str) -> str:
        """The path or URL of the file `name`. Raises `DataError` for one of `links`."""
        if name in self.links:
            raise DataError(leads_out(f"{self.root}/{name}", self.links[name]))
        return f"{self.root}/{name}"

    def locations(self, names: pa.Array) -> pa.Array:
        """As `location`, of many files."""
        for name in names.filter(pc.is_in(names, pa.array([*self.links], names.type))).to_pylist():
            self.location(name)
        return pc.binary_join_element_wise(pa.scalar(self.root, names.type), names, pa.scalar("/", names.type))

    def captions(self, names: pa.Array, notes: Notes) -> pa.Array:
        """The captions in the small files `names`, each on one line (large_string).

        Local files are not opened again before they change. Those in which something is odd are, to say so again.
        """
        if is_url(self.root) or not len(names):
            texts = self._fetched(names.to_pylist(), notes)
            return pa.array([one_line(text) for text in texts], pa.large_string())
        paths, place = self.locations(names), kept.place_of("captions", os.path.abspath(self.root))
        known = kept.load(place, _KEPT, _KEPT_VERSION)
        known = (_KEPT.empty_table() if known is None else known).combine_chunks()
        parts = [states(paths[first : first + ROWS].to_pylist()) for first in range(0, len(paths), ROWS)]
        sizes, times = map(pa.concat_arrays, zip(*parts))
        rows = pc.index_in(names, known["name"])
        same = [
            pc.equal(known[c].take(rows).combine_chunks(), v) for c, v in (("size", sizes), ("changed", times))
        ]
        is_same = pc.fill_null(pc.and_(*same), False)
        texts, is_new = known["text"].take(rows).combine_chunks(), pc.invert(is_same)
        places, odd = np.flatnonzero(is_new), np.zeros(len(names), bool)
        read = self._read(names.take(pa.array(places)), odd, places, notes)
        texts = pc.replace_with_mask(texts, is_new, pa.array(read, pa.large_string()))
        if not odd[places].all() or np.count_nonzero(~odd) != known.num_rows:
            table = pa.table([names, sizes, times, texts], schema=_KEPT)
            kept.save(place, table.filter(pa.array(~odd)), _KEPT_VERSION)
        return texts

    def _read(self, names: pa.Array, odd: np.ndarray, places: np.ndarray, notes: Notes) -> Iterator[str]:
        """The captions in local files; `odd` is set at the `places` of those that `notes` are about."""
        for name, place in zip(names, places):
            own = Notes(captions_required=True, reach=notes.reach)
            try:
                yield one_line(own.decode(_head(self.location(name.as_py())), name.as_py()))
            except MediaError as error:
                raise DataError(f"{error}; fix or remove it.") from error
            odd[place] = notes.take(own)

    def _fetched(self, names: Sequence[str], notes: Notes) -> Iterator[str]:
        """The texts of small files on a server."""
        fs, inner = filesystem(self.root)
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            paths = [f"{inner.rstrip('/')}/{name}" for name in some]
            # Not `cat`, which takes the brackets of "clip [HD].txt" for a pattern.
            heads = fs.cat_ranges(paths, 0, MAX_CAPTION_BYTES + 1, on_error="return")
            for name, path, data in zip(some, paths, heads, strict=True):
                if not isinstance(data, bytes) and _is_empty(fs, path):
                    data = b""  # a server has no range to answer with
                if not isinstance(data, bytes):
                    again = partial(fs.cat_file, path, start=0, end=MAX_CAPTION_BYTES + 1)
                    try:
                        data = retried(self.location(name), again)
                    except MediaError as error:
                        raise DataError(f"{error}; check the server.") from error
                yield notes.decode(data, name)


def _head(path: str) -> bytes:
    """The start of a small file, in a third of the time that `open_text` takes."""
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block
        try:
            if (
                stat.S_ISREG(os.fstat(file).st_mode)
                and len(data := os.read(file, MAX_CAPTION_BYTES + 1)) < 1 << 16
            ):
                return data
        finally:
            os.close(file)
    with open_text(path) as whole:
        return whole.read(MAX_CAPTION_BYTES + 1)


def _is_empty(fs: Any, path: str) -> bool:
    with suppress(Exception):  # each of fsspec's file systems has its own errors
        return bool(fs.info(path).get("size") == 0)
    return False


def list_folder(root: str, notes: Notes) -> Folder:
    """The folder with all its levels, empty if there is none. Raises `DataError` for a server's errors."""
    return _list_remote(root.rstrip("/")) if is_url(root) else _list_local(root, notes)


def _list_local(root: str, notes: Notes) -> Folder:
    found: list[pa.Array] = []
    some: list[str] = []  # as Python objects
    links: dict[str, str] = {}
    seen = {os.path.realpath(root)}  # a folder that several links lead to is read once, so loops of links end
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        entries: list[os.DirEntry[str]] = []
        with suppress(OSError), os.scandir(folder) as scanned:
            # A leading dot marks what tools leave beside the files, such as macOS's '._clip.mp4'.
            entries = [entry for entry in scanned if not entry.name.startswith(".")]
        below = {entry.name for entry in entries if _is_folder(entry)}
        inner = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                inner.append(os.path.join(folder, name))
        waiting += reversed(inner)
        start = os.path.join(folder, "").removeprefix(os.path.join(root, ""))
        own = [start + name for name in sorted({entry.name for entry in entries} - below)]
        has_links = any(map(os.DirEntry.is_symlink, entries))
        for name in own if own and (has_links or not notes.reach.allows(folder)) else ():
            if (target := notes.reach.leaves(os.path.join(root, name))) is not None:
                links[name] = target
        some += own
        if len(some) >= ROWS:
            found.append(_texts(some, notes))
            some.clear()
    return Folder(root, pa.concat_arrays([*found, _texts(some, notes)]), links)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _texts(names: list[str], notes: Notes) -> pa.Array:
    """Those of the names that are UTF-8."""
    with suppress(UnicodeEncodeError):
        return pa.array(names, pa.large_string())
    for name in names:
        if not is_text(name):
            notes.add("files left out for their names, which are not UTF-8", repr(name))
    return pa.array(filter(is_text, names), pa.large_string())


def _list_remote(root: str) -> Folder:
    fs, inner = filesystem(root)
    inner = inner.rstrip("/")
    try:
        # `find` returns nothing if the server is down; `ls` raises.
        found = retried(root, lambda: fs.find(inner) or fs.ls(inner)[:0])
    except MediaError as error:
        if error.reason != "no such file":
            raise DataError(f"{error}; check the address and your rights.") from error
        found = []
    names = (path.removeprefix(inner).lstrip("/") for path in found)
    shown = [n for n in names if n and not any(p.startswith(".") for p in n.split("/"))]
    return Folder(root, pa.array(shown, pa.large_string()))
