"""Which samples an epoch consists of, saved in a checkpoint so that a resumed run can report what has changed.

`sat_ext.json` has a hash of each cell's keys, in their order. `data.pt` has, for samples at regular places of
each cell's epoch, hashes of key, captions and file. Up to `SAMPLED` samples in the whole data set these are all of
them, and the report is exact; beyond that it is an estimate."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import torch

from sat_ext.checkpoint.manifest import CellState
from sat_ext.data.index import Group, Index
from sat_ext.data.schedule import Schedule

SAMPLED = 1 << 17
PARTS = ("keys", "captions", "files")
_WINDOW = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """For each cell of the schedule: the hash of all its keys, and `PARTS` (int64) of some samples."""

    keys: tuple[str, ...]
    samples: tuple[dict[str, torch.Tensor], ...]


def epoch_of(index: Index, schedule: Schedule) -> Epoch:
    """The epoch of an index, in the order of its schedule. 100 million records take about a minute."""
    hashes, total = _hashes(index.table["key"]), sum(len(g.rows) for g in index.groups)
    keys, samples = [], []
    for cell, group in enumerate(index.groups):
        own = _identities(hashes, group)
        keys.append(f"{zlib.crc32(own.data):08x}")
        count = min(len(own), max(1, SAMPLED * len(own) // total))
        records = schedule.records(cell, _places(len(own), count))
        found = {"keys": own[records].view(np.int64), **_contents(index, group.rows[records])}
        samples.append({part: torch.from_numpy(values) for part, values in found.items()})
    return Epoch(keys=tuple(keys), samples=tuple(samples))


def changes(
    cells: Sequence[CellState], saved: Sequence[Mapping[str, torch.Tensor]], index: Index, schedule: Schedule,
    used: Sequence[int],
) -> Iterator[str]:  # fmt: skip
    """A sentence for each source that has changed, or changed its order, since a checkpoint (`cells`, `saved`).

    `schedule` is that of `index` with the present seed; `used` samples of each of its cells were trained on."""
    now = epoch_of(index, schedule)
    hashes = _hashes(index.table["key"])
    for source in dict.fromkeys(c.source for c in cells):
        before = [(c, s) for c, s in zip(cells, saved, strict=True) if c.source == source]
        after = {
            str(g.bucket): (len(g.rows), keys, samples)
            for g, keys, samples in zip(index.groups, now.keys, now.samples, strict=True)
            if g.source == source
        }
        same = {c.bucket: (c.records, c.keys) for c, _ in before} == {k: v[:2] for k, v in after.items()} and all(
            torch.equal(samples[part], after[c.bucket][2][part]) for c, samples in before for part in PARTS
        )
        if after and not same:
            yield _compare(source, before, index, hashes, schedule, used)


def _compare(
    source: str, parts: Sequence[tuple[CellState, Mapping[str, torch.Tensor]]], index: Index, hashes: np.ndarray,
    schedule: Schedule, used: Sequence[int],
) -> str:  # fmt: skip
    """What has become of a source's samples, matched by key whatever their buckets."""
    groups = [(cell, g) for cell, g in enumerate(index.groups) if g.source == source]
    keys = np.concatenate([_identities(hashes, g) for _, g in groups])
    rows = np.concatenate([g.rows for _, g in groups])
    coming = np.concatenate([_coming(schedule, cell, used[cell]) for cell, _ in groups])
    order = np.argsort(keys)
    counts = dict.fromkeys(("gone", "captions", "files", "twice", "missed"), 0.0)
    for state, samples in parts:
        known = samples["keys"].numpy().view(np.uint64)
        weight = state.records / len(known)  # what each of the listed samples counts for
        seen = _places(state.records, len(known)) < state.used % state.records
        at = order[np.minimum(np.searchsorted(keys, known, sorter=order), len(keys) - 1)]
        here = keys[at] == known
        counts["gone"] += weight * np.count_nonzero(~here)
        counts["twice"] += weight * np.count_nonzero(here & seen & coming[at])
        counts["missed"] += weight * np.count_nonzero(here & ~seen & ~coming[at])
        for part, values in _contents(index, rows[at[here]]).items():
            counts[part] += weight * np.count_nonzero(values != samples[part].numpy()[here])
    total, exact = sum(c.records for c, _ in parts), all(len(s["keys"]) == c.records for c, s in parts)
    counts["new"] = len(keys) - total + counts["gone"]
    about = "" if exact else "about "
    number = {name: f"{about if count else ''}{count:.0f}" for name, count in counts.items()}
    sentences = {
        "gone": f"{number['gone']} of its {total} samples are gone",
        "new": f"{number['new']} are new",
        "captions": f"{number['captions']} have other captions",
        "files": f"{number['files']} have files of another size or modification time",
    }
    said = [sentence for name, sentence in sentences.items() if counts[name] >= 1]
    buckets, now = {c.bucket for c, _ in parts}, {str(g.bucket) for _, g in groups}
    if buckets != now:
        said.append(f"its buckets were {', '.join(sorted(buckets))}")
    return (
        f"resume: source '{source}' has changed since the checkpoint: "
        f"{', '.join(said) or 'its samples are in another order'}; "
        f"in this epoch {number['twice']} samples come twice, and {number['missed']} not at all."
    )


def _coming(schedule: Schedule, cell: int, used: int) -> np.ndarray:
    """For each record of a cell, whether it is still to come in this epoch."""
    records = schedule.cells[cell].records
    coming = np.zeros(records, bool)
    coming[schedule.records(cell, np.arange(used % records, records, dtype=np.int64))] = True
    return coming


def _places(records: int, count: int) -> np.ndarray:
    """`count` places, evenly spaced over an epoch of so many records."""
    return np.arange(count, dtype=np.int64) * records // count


def _contents(index: Index, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Hashes (int64) of the captions and the files of some rows."""
    found = {part: np.zeros(len(rows), np.int64) for part in ("captions", "files")}
    order = np.argsort(rows, kind="stable")
    ordered, first, start = rows[order].astype(np.int64), 0, 0
    # batch by batch: `take` on the whole column would concatenate it, and Arrow's strings end at 2 GiB
    for batch in index.table.select(["captions", "fingerprint"]).to_batches():
        end = int(np.searchsorted(ordered, first + batch.num_rows))
        if end > start:
            part = batch.take(pa.array(ordered[start:end] - first))
            found["captions"][order[start:end]] = [_hash("\0".join(c)) for c in part["captions"].to_pylist()]
            found["files"][order[start:end]] = [_hash(text) for text in part["fingerprint"].to_pylist()]
        first, start = first + batch.num_rows, end
    return found


def _hash(text: str) -> int:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _identities(hashes: np.ndarray, group: Group) -> np.ndarray:
    """For each record of a group (uint64): the hash of its key, shifted by the number of its window."""
    found = hashes[group.rows]
    return found if group.windows is None else found + group.windows.astype(np.uint64) * _WINDOW


@lru_cache(maxsize=1)
def _factors(count: int) -> np.ndarray:
    return np.random.PCG64(0).random_raw(count)


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """For each string of a column (uint64): the sum of its bytes, each times a random number of its position."""
    found = [np.zeros(0, np.uint64)]
    for chunk in column.iterchunks():
        text = chunk.cast(pa.large_binary())
        offsets = np.frombuffer(text.buffers()[1], np.int64, len(text) + 1, 8 * text.offset)
        lengths, starts = np.diff(offsets), offsets[:-1] - offsets[0]
        values = np.frombuffer(text.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]].astype(np.uint64)
        size = 1 << int(lengths.max(initial=1)).bit_length()
        places = np.arange(len(values)) - np.repeat(starts, lengths)
        sums, filled = np.zeros(len(text), np.uint64), lengths > 0
        sums[filled] = np.add.reduceat(_factors(size)[places] * (values + np.uint64(1)), starts[filled])
        found.append(sums)
    return np.concatenate(found)
