"""`data.params.held_out`: which items are never trained on, chosen by a hash of their keys."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Literal

import numpy as np

from sat_ext.errors import DataError
from sat_ext.files import is_url

Side = Literal["train", "held_out"]

# Folders that data sets of clips, stills and first frames are sorted into, each with the same names.
_SORTED_INTO = frozenset(("videos", "clips", "images", "stills", "frames", "first_frames"))
_REPEAT = re.compile(r"#[0-9]+$")  # of a table's row that names a file again


def family_of(key: str) -> str:
    """What an item's near-duplicates share: its key without ending, without number, and without such a folder.

    A clip, its first frame, and the rows of a table that name it again stay on one side.

    >>> {family_of(k) for k in ("a/x.mp4", "a/x.mp4#2", "a/x.jpg", "a/videos/x.mp4", "a/first_frames/x.first.png")}
    {'a/x'}
    >>> family_of("shard.parquet#12")  # a row that holds its file: its number is its name
    'shard.parquet#12'
    """
    *folders, name = key.split("/")
    if ".parquet#" not in name:
        name = _REPEAT.sub("", name).partition(".")[0] or name
    return "/".join([*(f for f in folders if f.lower() not in _SORTED_INTO), name])


def split(
    items: Mapping[str, Sequence[tuple[str, str]]], held_out: float | int, side: Side
) -> dict[str, np.ndarray]:
    """Which items of each source, given as (key, path), are on one side.

    `held_out` is a part of all items, below 1, or a number of them, reached family by family in the order of their
    hashes. Either way an item keeps its side when others are added, except that a new one may take the
    place of one that a number held out. A file that is held out under one key is so under every other. Raises
    `DataError` if nothing is held out, or nothing of a source is left.

    >>> files = [(f"{i}.mp4", f"{i}.mp4") for i in range(1000)]
    >>> [int(split({"data": files}, part, "held_out")["data"].sum()) for part in (0.02, 7)]
    [20, 7]
    """
    families = _families(items)
    sizes = Counter(family for own in families.values() for family in own)
    if isinstance(held_out, int):
        ordered = sorted(sizes, key=_hash)
        before = accumulate((sizes[family] for family in ordered), initial=0)
        chosen = {family for family, found in zip(ordered, before) if found < held_out}
    else:
        chosen = {family for family in sizes if _hash(family) < held_out * 2**64}
    sides = {
        source: np.array([(of in chosen) == (side == "held_out") for of in own], bool)
        for source, own in families.items()
    }
    if side == "train" and (emptied := [source for source, own in sides.items() if not own.any()]):
        raise DataError(
            f"data.params.held_out: {held_out} takes all records of {emptied[0]}; use less, or name held-out data "
            "in args.valid_data instead."
        )
    if not chosen:
        raise DataError(
            f"data.params.held_out: {held_out} of {sum(map(len, items.values()))} records is none; write a number "
            "of records, such as 8, or name held-out data in args.valid_data instead."
        )
    return sides


def _families(items: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, list[str]]:
    """The family of each item. Families that share a file, which a table may name by another way than its folder
    does, are one, under the first of their names."""
    own = {source: [family_of(key) for key, _ in of] for source, of in items.items()}
    first: dict[str, str] = {}  # of each name, another one of its family that is before it

    def root(family: str) -> str:
        while family in first:
            family = first[family]
        return family

    of_file: dict[str, str] = {}
    for source, of in items.items():
        for (_, path), family in zip(of, own[source]):
            path = path if is_url(path) else os.path.normpath(path)
            one, other = sorted((root(of_file.setdefault(path, family)), root(family)))
            if one != other:
                first[other] = one
    return {source: [root(family) for family in names] for source, names in own.items()}


def _hash(family: str) -> int:
    return int.from_bytes(blake2b(family.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
