"""How far the names and links in a data set may lead: whoever made it must not choose what this machine reads."""

from __future__ import annotations

import os
from collections.abc import Iterable

from sat_ext.errors import ConfigError, DataError
from sat_ext.files import container_of, is_url

PROTOCOLS = frozenset({"s3", "s3a", "gs", "hf", "http", "https"})  # of which a row may name an address
_LONGEST_SHOWN = 200  # letters of a name in a message


class Reach:
    """Folders that the local names of one source may lead to, and the kinds of addresses that its rows may have.

    `allowed` is `data.params.allowed_roots`: folders, and protocols such as "sftp://". Links are resolved before a
    file is judged. The folders of the source itself come by `add`.
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        protocols = {root.removesuffix("://") for root in allowed if root.endswith("://")}
        self._protocols = PROTOCOLS | protocols
        self._roots: list[str] = []
        # Of folders, where they really are, and whether that is inside: resolving every file would take too long.
        self._folders: dict[str, tuple[str, bool]] = {}
        for root in allowed:
            if not root.endswith("://"):
                self.add(os.path.expanduser(root))

    def add(self, folder: str, *below: str) -> None:
        """Allow what lies in `folder`, or only in `below` in it, as long as that is no link. In the Hugging Face
        hub's cache, whose snapshots are links to the files of `blobs/`, these too."""
        if is_url(folder):
            return
        self._folders.clear()
        real = os.path.join(os.path.realpath(folder), *below)
        self._roots.append(os.path.join(real, ""))
        repository, snapshots, _ = real.rpartition("/snapshots/")
        if snapshots and os.path.isdir(os.path.join(repository, "refs")):
            self._roots.append(os.path.join(repository, "blobs", ""))

    def leaves(self, path: str) -> str | None:
        """Where the local file `path` really is, if that is none of the allowed folders; else None."""
        folder, name = os.path.split(path)
        try:
            real, inside = self._folders.get(folder) or self._look_up(folder)
            file = os.path.join(real, name)
            if name in (".", "..") or os.path.islink(file):
                file = os.path.realpath(file)
                inside = self._is_inside(file)
        except ValueError:  # a null byte: there is no such file
            return None
        return None if inside else file

    def _look_up(self, folder: str) -> tuple[str, bool]:
        real = os.path.realpath(folder)
        found = self._folders[folder] = real, self._is_inside(os.path.join(real, ""))
        return found

    def _is_inside(self, real: str) -> bool:
        return real.startswith(tuple(self._roots))

    def check(self, path: str, where: str) -> None:
        """Raise `DataError`, which begins with `where`, for a location that leads too far."""
        file = container_of(path)
        name = file if len(file) <= _LONGEST_SHOWN else file[:_LONGEST_SHOWN] + "..."
        if is_url(file):
            protocol = file.partition("://")[0].lower()
            if protocol not in self._protocols:
                raise DataError(
                    f"{where}: '{name}' is of the kind {protocol}://; a data set may name files and addresses of "
                    f"{', '.join(sorted(PROTOCOLS))}; where you trust it, add '{protocol}://' to "
                    "data.params.allowed_roots (sat-ext check: --allow)."
                )
        elif real := self.leaves(file):
            raise DataError(leads_out(f"{where}: '{name}'", real))


def leads_out(what: str, real: str) -> str:
    """The sentence for a name that leads to the file `real`."""
    return (
        f"{what} leads to {real}, out of the source's folder; where you trust the data set, add "
        f"'{os.path.dirname(real)}' to data.params.allowed_roots (sat-ext check: --allow)."
    )


def check_roots(roots: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for an entry of `allowed_roots` that is neither a folder nor a protocol."""
    for root in roots:
        if not root or (is_url(root) and not root.endswith("://")):
            raise ConfigError(f"{where}: {root!r}; give a folder, such as /mnt/media, or a protocol: sftp://.")
