"""Builds and parses the strings that say where bytes are. Pure."""

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

# The container ends at the first ".tar#", so that no member's name can point to another file.
_MEMBER = re.compile(r"(.+?\.tar(?:\?[^#]*)?)#(.+)@([0-9]+)\+([0-9]+)", re.DOTALL | re.IGNORECASE)
_CELL = re.compile(r"(.+?\.parquet(?:\?[^#]*)?)#(.+)@([0-9]+)(\.[a-z0-9]+)", re.DOTALL | re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters or more: C:// is a drive


@dataclass(frozen=True, slots=True)
class TarMember:
    """`size` bytes at `offset` of a tar."""

    container: str
    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """One cell of a Parquet table, rows counted from 0."""

    container: str
    column: str
    row: int
    suffix: str


def member_location(tar: str, name: str, offset: int, size: int) -> str:
    """The location of the `size` bytes at byte `offset` of `tar`, its member `name`."""
    return f"{tar}#{name}@{offset}+{size}"


def cell_location(table: str, column: str, row: int, suffix: str) -> str:
    """The location of a file in a Parquet table's cell; `suffix` (.jpg) is the file's."""
    return f"{table}#{column}@{row}{suffix}"


def inside_of(path: str) -> TarMember | ParquetCell | None:
    """The parts of a member's or a cell's location; None for a file or URL."""
    if "#" not in path:
        return None
    if match := _MEMBER.fullmatch(path):
        return TarMember(match[1], match[2], int(match[3]), int(match[4]))
    if match := _CELL.fullmatch(path):
        return ParquetCell(match[1], match[2], int(match[3]), match[4])
    return None


def container_of(path: str) -> str:
    """The file or URL that holds `path`: a member's or cell's container, else `path` itself."""
    inside = inside_of(path)
    return inside.container if inside else path


def is_url(path: str) -> bool:
    """Whether fsspec reads it, also for members and cells of containers behind a URL."""
    return _URL.match(path) is not None


def is_local(path: str) -> bool:
    """Whether `path` is a plain local file, which any library can open by its name."""
    return not is_url(path) and inside_of(path) is None


def suffix_of(path: str) -> str:
    """The lower-case extension, with its dot, of what `path` names.

    >>> [suffix_of(p) for p in ("A.MP4", "0.tar#b/c.jpg@512+9", "t.parquet#image@3.png", "https://h/d.webm?key=1.0")]
    ['.mp4', '.jpg', '.png', '.webm']
    """
    inside = inside_of(path)
    if isinstance(inside, ParquetCell):
        return inside.suffix.lower()
    name = inside.name if inside else path
    if inside is None and name.startswith(("http://", "https://")):
        name = urlsplit(name).path
    return os.path.splitext(name)[1].lower()
