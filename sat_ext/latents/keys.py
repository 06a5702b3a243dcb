"""Which file of a folder holds which key: sorted arrays, kept in a file beside them and mapped into memory.

As Python objects the keys of a million samples would take hundreds of megabytes in each rank.
"""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from sat_ext.errors import DataError, MediaError
from sat_ext.latents.checksummed import opened, read_tensors, write_checksummed

KEY = np.dtype("S16")  # the bytes of a key, which is 32 digits in the names of tensors
_DIGITS = re.compile("[0-9a-f]{32}")

# of a file: the keys that its header lists, those of what could not be encoded, and a note
Read = Callable[[Path], tuple[Iterable[str], Iterable[str], str]]


class KeyTable:
    """The keys of the files `<prefix>-*.safetensors` of a folder, which `read` lists.

    They are kept in `<prefix>.index`, which counts as long as the files have the same names, sizes and times.
    `notes` has one for each of `files`; `state` changes when these do.
    """

    def __init__(self, folder: Path, prefix: str, read: Read) -> None:
        self.files = sorted(folder.glob(f"{prefix}-*.safetensors"))
        statuses = [(file.name, file.stat()) for file in self.files]
        self.state = json.dumps([(name, status.st_size, status.st_mtime_ns) for name, status in statuses])
        index = folder / f"{prefix}.index"
        try:
            with opened(index) as (_, metadata):
                state, self.notes = metadata["state"], json.loads(metadata["notes"])
            tensors = read_tensors(index, ("keys", "places")) if state == self.state else {}
        except (DataError, MediaError, KeyError, ValueError):
            tensors = {}  # damaged or absent: the files say it all
        if not tensors:
            keys, places, self.notes = _list(self.files, read)
            tensors = {"keys": torch.from_numpy(keys.view(np.uint8)), "places": torch.from_numpy(places)}
            with suppress(DataError):  # a folder that cannot be written is listed at every start
                write_checksummed(index, tensors, {"state": self.state, "notes": json.dumps(self.notes)})
        self.keys, self._places = tensors["keys"].numpy().view(KEY), tensors["places"].numpy()

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of `keys` (`KEY`) are here. Sorted ones are found faster."""
        places = np.searchsorted(self.keys, keys)
        found = places < len(self.keys)
        found[found] = self.keys[places[found]] == keys[found]
        return found

    def find(self, key: str) -> tuple[Path, bool] | None:
        """The file of a key, and whether it is bad; None where it is not here."""
        wanted = packed([key])
        if not self.has(wanted)[0]:
            return None
        number = int(self._places[np.searchsorted(self.keys, wanted)[0]])
        return self.files[max(number, ~number)], number < 0

    @property
    def bad(self) -> np.ndarray:
        """The keys of what could not be encoded."""
        return self.keys[self._places < 0]


def packed(keys: Iterable[str]) -> np.ndarray:
    """Keys as an array of `KEY`."""
    return np.fromiter(map(bytes.fromhex, keys), KEY)


def _list(files: list[Path], read: Read) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sorted keys; the number of each one's file, inverted (~) for what is bad; the notes."""
    parts, places, notes = [np.empty(0, KEY)], [np.empty(0, np.int32)], []
    for number, file in enumerate(files):
        *listed, note = read(file)
        notes.append(note)
        for names, place in zip(listed, (number, ~number)):
            parts.append(packed(filter(_DIGITS.fullmatch, names)))  # a damaged name is none
            places.append(np.full(len(parts[-1]), place, np.int32))
    keys, of = np.concatenate(parts), np.concatenate(places)
    order = np.lexsort((of, keys))  # of a key in two files `find` sees the first: a bad one is not encoded again
    return keys[order], of[order], notes
