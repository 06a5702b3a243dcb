"""How far the names and links in a data set may lead: whoever made it must not choose what this machine reads."""

import os
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.data.sources.texts import by_folded, folded, listed, shown
from sat_ext.errors import ConfigError, DataError
from sat_ext.files import container_of, is_url

_MANY = 64  # files of one folder, for which looking through it is cheaper than looking at each
PROTOCOLS = frozenset({"s3", "s3a", "gs", "hf", "http", "https"})  # a row may name addresses of these


class Reach:
    """The folders that local names of one source may lead to, and the protocols of addresses in its rows.

    `allowed` is `data.params.allowed_roots`: folders, and protocols such as "sftp://". `add` allows the source's
    own folders.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        protocols = {root.removesuffix("://") for root in allowed if root.endswith("://")}
        self.protocols = PROTOCOLS | protocols
        self._roots: tuple[str, ...] = ()
        # Where folders really are, and whether that is allowed: resolving every file would take too long.
        self._folders: dict[str, tuple[str, bool]] = {}
        self._linked: dict[str, bool] = {}  # whether a folder holds links
        for root in allowed:
            if not root.endswith("://"):
                self.add(os.path.expanduser(root))

    def add(self, folder: str, *below: str) -> None:
        """Allow `folder`, or only `below` in it, as long as that is not a link."""
        if is_url(folder):
            return
        self._folders.clear()
        real = os.path.join(os.path.realpath(folder), *below)
        self._roots += (os.path.join(real, ""),)
        # A snapshot in the Hugging Face hub's cache consists of links to `blobs/`.
        repository, snapshots, _ = real.rpartition("/snapshots/")
        if snapshots and os.path.isdir(os.path.join(repository, "refs")):
            self._roots += (os.path.join(repository, "blobs", ""),)

    def leaves(self, path: str) -> str | None:
        """Where the local file `path` really is, if that is outside the allowed folders; else None."""
        folder, name = os.path.split(path)
        try:
            real, inside = self._folder(folder)
            file = os.path.join(real, name)
            if name in (".", "..") or os.path.islink(file):
                file = os.path.realpath(file)
                inside = file.startswith(self._roots)
        except ValueError:  # a null byte: there is no such file
            return None
        return None if inside else file

    def allows(self, folder: str) -> bool:
        """Whether the folder itself is an allowed one."""
        return self._folder(folder or "/")[1]

    def _folder(self, folder: str) -> tuple[str, bool]:
        if folder not in self._folders:
            real = os.path.realpath(folder)
            self._folders[folder] = real, os.path.join(real, "").startswith(self._roots)
        return self._folders[folder]

    def holds(self, paths: pa.Array) -> bool:
        """Whether all of the local files `paths` are no links, and in allowed folders. False: ask for each."""
        folders = pc.value_counts(pc.replace_substring_regex(paths, "(?:^|/)[^/]*$", ""))
        counts = dict(zip(*(field.to_pylist() for field in folders.flatten())))
        for folder, files in counts.items():
            if files >= _MANY and folder not in self._linked:
                try:
                    with os.scandir(folder or "/") as found:
                        self._linked[folder] = any(map(os.DirEntry.is_symlink, found))
                except FileNotFoundError:
                    self._linked[folder] = False
                except OSError:
                    return False
            if self._linked.get(folder) or not self.allows(folder):
                return False
        few = counts.keys() - self._linked.keys()
        return not few or not any(os.path.islink(p) for p in paths.to_pylist() if p.rpartition("/")[0] in few)

    def check(self, path: str, where: str) -> None:
        """Raise `DataError`, which begins with `where`, for a location that leads too far."""
        file = container_of(path)
        if is_url(file):
            protocol = file.partition("://")[0].lower()
            if protocol not in self.protocols:
                raise DataError(
                    f"{where}: {shown(file)} is a {protocol}:// address; a data set may name files and "
                    f"{', '.join(sorted(PROTOCOLS))} addresses; if you trust it, add '{protocol}://' to "
                    "data.params.allowed_roots (sat-ext check: --allow)."
                )
        elif real := self.leaves(file):
            raise DataError(leads_out(f"{where}: {shown(file)}", real))


def leads_out(what: str, real: str) -> str:
    """The sentence for a name that leads to the file `real`."""
    return (
        f"{what} leads to {real}, out of the source's folder; if you trust the data set, add "
        f"'{os.path.dirname(real)}' to data.params.allowed_roots (sat-ext check: --allow)."
    )


def check_roots(roots: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for an entry of `allowed_roots` that is neither a folder nor a protocol."""
    for root in roots:
        if not root or (is_url(root) and not root.endswith("://")):
            raise ConfigError(f"{where}: {root!r}; give a folder, such as /mnt/media, or a protocol: sftp://.")


def resolve(base: str, file: str, where: str, reach: Reach) -> str:
    """Where `file` of a table in the folder or URL `base` is: a URL, an absolute path, or relative to `base`.

    Raises `DataError` if that is out of `reach`.
    """
    if is_url(file) or not is_url(base):
        path = file if is_url(file) else os.path.join(base, _as_on_disk(base, file, where))
        reach.check(path, where)
        return path
    file = file.replace("\\", "/")
    if file.startswith("/"):
        raise DataError(f"{where}: '{file}' is a local path in a table behind a URL; write a relative one.")
    scheme, _, folder = base.partition("://")
    parts = folder.split("/")
    for part in file.split("/"):  # S3 would take "./a.mp4" and "../a.mp4" literally
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(quote(part) if scheme in ("http", "https") else part)
    return f"{scheme}://{'/'.join(parts)}"


def _as_on_disk(base: str, file: str, where: str) -> str:
    """The name on this disk of a file in a table made on another system; `file` itself if nothing is alike.

    Tables from Windows have backslashes, those from macOS other accents, and both other case. Because it takes a
    look at the disk, only names with backslashes, non-ASCII letters or spaces around them are compared.
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
