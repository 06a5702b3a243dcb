"""What lies in a folder, on a disk or behind a URL, and the text of its small files."""

from __future__ import annotations

import codecs
import logging
import os
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

from sat_ext.data.sources.reach import Reach, leads_out
from sat_ext.errors import DataError
from sat_ext.files import filesystem, is_url, reason_of
from sat_ext.types import OTHER_EXTENSIONS

log = logging.getLogger(__name__)

# A caption is cut there. No text encoder reads a hundredth of it, and a video called .txt shall not fill memory.
MAX_CAPTION_BYTES = 1 << 20

# How text files begin that are not plain UTF-8; of those that fit the first counts. Windows writes such files.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_LISTED = 3  # how many examples a message names
_AT_ONCE = 256  # small files that are fetched together from a server


class Notes:
    """What is odd about a source but no reason to stop: one warning for each kind of it, with a count.

    Where captions are not required, files without one are items without captions. `reach` says which names of the
    source may be opened; `unread` counts, by ending, files that may be media and are not read.
    """

    def __init__(self, *, captions_required: bool = True, reach: Reach | None = None) -> None:
        self.captions_required, self.reach = captions_required, reach or Reach()
        self.unread: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()  # shards are read in threads

    def add(self, what: str, name: str) -> None:
        """`name` is one of `what`, such as "empty captions"."""
        with self._lock:
            self._counts[what] = self._counts.get(what, 0) + 1
            if self._counts[what] <= _LISTED:
                self._names.setdefault(what, []).append(name)

    def leave_out(self, name: str) -> None:
        """A file that is no media by its ending."""
        ending = os.path.splitext(name)[1].lower()
        if ending and ending not in OTHER_EXTENSIONS:
            with self._lock:
                self.unread[ending] += 1
            self.add(f"files ending in {ending} are not read and were left out; convert or rename them", name)

    def log(self, source: str) -> None:
        """Write them down."""
        for what, count in self._counts.items():
            log.warning("%s: %s: %d (%s)", source, what, count, listed(self._names[what], count))


def listed(names: Sequence[str], count: int | None = None) -> str:
    """The first few names for a message, out of `count`."""
    count = len(names) if count is None else count
    return ", ".join(f"'{n}'" for n in names[:_LISTED]) + (", ..." if count > _LISTED else "")


@dataclass(frozen=True, slots=True)
class Folder:
    """`names`: every file below `root`, relative to it, with forward slashes, in any order. No hidden ones.

    `links`: those of them that links lead out of the source, and may not be opened.
    """

    root: str
    names: list[str]
    links: Mapping[str, str] = field(default_factory=dict)

    def location(self, name: str) -> str:
        """Where the file `name` is. Raises `DataError` for one of `links`."""
        if name in self.links:
            raise DataError(leads_out(f"{self.root}/{name}", self.links[name]))
        return f"{self.root}/{name}"

    def texts(self, names: Sequence[str], notes: Notes) -> Iterator[str]:
        """The text of each of the small files `names`: UTF-8, with or without a mark, what is not replaced."""
        if not is_url(self.root):
            for name in names:
                yield text_of(_head(self.location(name)), name, notes)
            return
        fs, inner = filesystem(self.root)
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            paths = [f"{inner.rstrip('/')}/{name}" for name in some]
            # Not `cat`, which would take the brackets of "clip [HD].txt" for a pattern.
            heads = fs.cat_ranges(paths, 0, MAX_CAPTION_BYTES + 1, on_error="return")
            for name, path, data in zip(some, paths, heads, strict=True):
                if not isinstance(data, bytes) and _is_empty(fs, path):
                    data = b""  # in which there is no range
                if not isinstance(data, bytes):
                    raise DataError(f"{self.location(name)}: cannot be read: {data}; check the server.")
                yield text_of(data, name, notes)


def _is_empty(fs: Any, path: str) -> bool:
    with suppress(Exception):  # each file system of fsspec has errors of its own
        return bool(fs.info(path).get("size") == 0)
    return False


def _head(path: str) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe could wait for ever
        raise DataError(f"{path}: not a regular file; mend or remove it.")
    try:
        with open(path, "rb") as file:
            return file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); mend or remove it.") from error


def text_of(data: bytes, name: str, notes: Notes) -> str:
    """One caption's bytes as text; what is wrong with them is noted under `name`."""
    if len(data) > MAX_CAPTION_BYTES:
        notes.add("captions cut after 1 MiB", name)
        data = data[:MAX_CAPTION_BYTES]
    encoding = encoding_of(data, name)
    decoder = codecs.getincrementaldecoder(encoding)
    whole = len(data) < MAX_CAPTION_BYTES  # what is cut may end inside a letter
    try:
        return decoder().decode(data, whole)
    except UnicodeDecodeError:
        notes.add("captions that are not UTF-8, their bad bytes replaced; save them as UTF-8", name)
        return decoder("replace").decode(data, whole)


def encoding_of(head: bytes, where: str) -> str:
    """The encoding of a text that starts with `head`. Raises `DataError` for UTF-16 and UTF-32 without a mark."""
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in head:
        raise DataError(
            f"{where}: it has null bytes, as a text in UTF-16 without a byte order mark; save it as UTF-8."
        )
    return encoding


def folded(name: str) -> str:
    """The same for names that differ only in case, or in how accents are written (macOS makes é two letters)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def by_folded(names: Iterable[str]) -> dict[str, list[str]]:
    """`names` that are the same to `folded`, by that."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(folded(name), []).append(name)
    return found


def one_line(text: str) -> str:
    """The lines of a caption, joined by spaces. Never a character that cannot be written as UTF-8."""
    if "\n" in text or "\r" in text or text != text.strip():
        text = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def list_folder(root: str, notes: Notes) -> Folder:
    """The folder with all its levels. Empty where there is none. Raises `DataError` for a server's errors."""
    if is_url(root):
        return _list_remote(root.rstrip("/"))
    links: dict[str, str] = {}
    return Folder(root, list(_list_local(root, notes, links)), links)


def _list_local(root: str, notes: Notes, links: dict[str, str]) -> Iterator[str]:
    """A folder that links lead to more than once is read once, so loops of links end."""
    seen = {os.path.realpath(root)}
    for folder, below, names in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(below):
            real = os.path.realpath(os.path.join(folder, name))
            # A leading dot marks what tools leave beside the files, such as macOS's '._clip.mp4'.
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        below[:] = kept
        start = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if start == "." else start + "/"
        for name in sorted(names):
            if name.startswith("."):
                continue
            if not is_text(prefix + name):
                notes.add("files left out for their names, which are not UTF-8", repr(prefix + name))
                continue
            target = notes.reach.leaves(os.path.join(folder, name))
            if target is not None:
                links[prefix + name] = target
            yield prefix + name


def is_text(name: str) -> bool:
    """Whether a file's name can be written as UTF-8; names on a disk may be any bytes."""
    if name.isascii():
        return True
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _list_remote(root: str) -> Folder:
    fs, inner = filesystem(root)
    inner = inner.rstrip("/")
    try:
        found = fs.find(inner)
    except FileNotFoundError:
        found = []
    except Exception as error:  # each file system of fsspec has errors of its own
        raise DataError(f"{root}: cannot be listed ({error}); check the address and your rights.") from error
    if not found:
        _refuse_unlistable(fs, root, inner)
    names = (path.removeprefix(inner).lstrip("/") for path in found)
    return Folder(root, [n for n in names if n and not any(p.startswith(".") for p in n.split("/"))])


def _refuse_unlistable(fs: Any, root: str, inner: str) -> None:
    """Raises `DataError` where `find` found nothing because the server is not there, which it does not tell."""
    try:
        fs.ls(inner)
    except Exception as error:
        reason = reason_of(error)
        if reason != "no such file":
            raise DataError(f"{root}: {reason}; check the address and your rights.") from error


def resolve(base: str, file: str, where: str, reach: Reach | None = None) -> str:
    """Where `file` of a table in the folder or URL `base` is: a URL, an absolute path, or relative to `base`.

    Raises `DataError` where that is not in `reach`.
    """
    if is_url(file) or not is_url(base):
        path = file if is_url(file) else os.path.join(base, _as_on_disk(base, file, where))
        (reach or Reach()).check(path, where)
        return path
    file = file.replace("\\", "/")
    if file.startswith("/"):
        raise DataError(
            f"{where}: '{file}' is a local path in a table behind a URL; write a relative one or a URL."
        )
    scheme, _, folder = base.partition("://")
    parts = folder.split("/")
    for part in file.split("/"):  # to S3, "./a.mp4" and "../a.mp4" are names of their own
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(quote(part) if scheme in ("http", "https") else part)
    return f"{scheme}://{'/'.join(parts)}"


def _as_on_disk(base: str, file: str, where: str) -> str:
    """How the file of a table made on another system is called here; `file` itself where nothing is alike.

    Tables of Windows have backslashes, those of macOS other accents, and both another case. Only names with
    backslashes, other letters than ASCII, or spaces around them are looked at: that costs a look at the disk.
    """
    if (file.isascii() and "\\" not in file and file == file.strip()) or os.path.lexists(os.path.join(base, file)):
        return file
    found = ""
    for part in file.strip().replace("\\", "/").split("/"):
        step = os.path.join(found, part) if found or part else "/"
        if not os.path.lexists(os.path.join(base, step)):
            folder = os.path.join(base, found)
            try:
                alike = _names_in(folder, os.stat(folder).st_mtime_ns).get(folded(part), [])
            except OSError:
                return file
            if len(alike) > 1:
                raise DataError(f"{where}: '{file}' may be any of {listed(alike)}; write it as it is on the disk.")
            if not alike:
                return file
            step = os.path.join(found, alike[0])
        found = step
    return found


@lru_cache(maxsize=64)
def _names_in(folder: str, changed: int) -> dict[str, list[str]]:
    return by_folded(os.listdir(folder))


def folder_of(path: str) -> str:
    """The folder or URL that a table lies in."""
    if not is_url(path):
        return os.path.dirname(path) or "."
    if path.startswith(("http://", "https://")):
        path = urlsplit(path)._replace(query="", fragment="").geturl()
    return path.rpartition("/")[0]
