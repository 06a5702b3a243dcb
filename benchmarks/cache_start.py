"""A cache of a million samples: opening it and finding all records of a run in it, now and as it was before.

    python benchmarks/cache_start.py [--samples 1000000] [--before 20000] [--json FILE]

Before, each rank read the headers of all files into a dict of keys, and the first made a list of all records'
entries at every start. Each measurement is of a process of its own: seconds of its CPU time, and what its memory
grows by. The pass over records as before is measured on `--before` of them, and counted up.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from report import report

from sat_ext.config import load
from sat_ext.data.index import Group, Index
from sat_ext.data.index.build import COLUMNS
from sat_ext.data.index.place import LEFT_OUT_COLUMNS
from sat_ext.data.params import DataConfig
from sat_ext.latents.encoders import Fingerprints
from sat_ext.latents.reader import Entries, open_reader
from sat_ext.latents.store import LatentStore, _entries_in, write_latents
from sat_ext.latents.text import write_text_embeddings
from sat_ext.types import Bucket

PER_FILE = 1000
GOAL = 5.0  # seconds


def main() -> None:
    """One line for each step of a start; exit code 1 if a warm start takes longer than the goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000, help="in the cache and in the run")
    parser.add_argument("--before", type=int, default=20_000, help="of them in the pass as it was")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = {"folder": name, "clips": 1}
        config = load(DataConfig, {"video_size": [32, 32], "max_num_frames": 1, "cache": cache}, "data.params")
        entries = Entries(index=index_of(options.samples), config=config, encoder="e" * 32, clips=1)
        write_cache(folder, entries)
        opened, grown = measured(lambda: dict_of_keys(folder))
        part = min(options.before, options.samples)
        passed, held = (figure * options.samples / part for figure in measured(lambda: list_of(entries, part)))
        now = [measured(lambda: LatentStore(folder)), measured(lambda: LatentStore(folder))]
        starts = [measured(lambda: start(entries)), measured(lambda: start(entries))]
    rows = [
        ("open, first time", opened, grown, *now[0], opened / now[0][0]),
        ("open", opened, grown, *now[1], opened / now[1][0]),
        ("start, first time", opened + passed, grown + held, *starts[0], (opened + passed) / starts[0][0]),
        ("start", opened + passed, grown + held, *starts[1], (opened + passed) / starts[1][0]),
    ]
    columns = ["step", "before, s", "before, MB", "now, s", "now, MB", "times as fast"]
    report(f"{options.samples:,} samples in files of {PER_FILE}", columns, rows, options.json)
    raise SystemExit(starts[1][0] > GOAL)


def start(entries: Entries) -> None:
    """As of a run on one rank."""
    prints = Fingerprints(first_stage=entries.encoder, text={})
    open_reader(entries.config, entries.index, prints, draws=True, conditions=False, share=lambda make: make())


def dict_of_keys(folder: Path) -> dict[str, int]:
    """As before."""
    files = sorted(folder.glob("latents-*.safetensors"))
    return {entry.key: number for number, file in enumerate(files) for entry in list(_entries_in(file))}


def list_of(entries: Entries, count: int) -> list[Any]:
    """As before: a row's values were made twice for each record."""
    (group,) = entries.index.groups
    found, seen = [], set()
    for record in range(count):
        entries.index.item(int(group.rows[record]))
        entry = entries.find(group, record, 0)[1]
        if entry.key not in seen:
            seen.add(entry.key)
            found.append(entry)
    return [found, seen]


def measured(do: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of CPU time, and megabytes that the memory grows by at most."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(do, theirs))
    process.start()
    theirs.close()
    found: tuple[float, float] = ours.recv()
    process.join()
    return found


def _measure(do: Callable[[], Any], pipe: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is used now
    before, since = _megabytes("VmHWM"), time.process_time()
    held = do()
    taken = time.process_time() - since
    pipe.send((taken, _megabytes("VmHWM") - before))
    del held


def _megabytes(name: str) -> float:
    (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) / 1024


def write_cache(folder: Path, entries: Entries) -> None:
    """Two numbers for each sample, and two for each caption."""
    (group,) = entries.index.groups
    for first in range(0, len(group.rows), PER_FILE):
        rows = group.rows[first : first + PER_FILE]
        found = (entries.find(group, first + i, 0, known) for i, known in enumerate(entries.index.items(rows)))
        write_latents(folder, [(entry, {"mean": torch.zeros(2)}) for _, entry in found])
    captions = (caption.as_py()[0] for caption in entries.index.table["captions"])
    write_text_embeddings(folder, captions, lambda of: torch.zeros(len(of), 1, 2), {}, batch=512)


def index_of(count: int) -> Index:
    """An index of stills."""
    batches = []
    for first in range(0, count, 4096):
        numbers = range(first, min(first + 4096, count))
        size = len(numbers)
        values: dict[str, Any] = {
            "path": [f"/data/stills/{i:07d}.jpg" for i in numbers],
            "key": [f"stills/{i:07d}.jpg" for i in numbers],
            "captions": [[f"still {i}, of which a caption says what can be seen in it"] for i in numbers],
            "width": [1280] * size, "height": [720] * size, "frames": [1] * size,
            "start": [0.0] * size, "weight": [1.0] * size, "fps": [0.0] * size, "duration": [0.0] * size,
            "codec": ["jpeg"] * size, "fingerprint": [f"{100_000 + i}-1700000000000000000" for i in numbers],
        }  # fmt: skip
        source = pa.DictionaryArray.from_arrays(np.zeros(size, np.int16), pa.array(["all"]))
        columns = [source] + [pa.array(values.get(f.name, [None] * size), f.type) for f in list(COLUMNS)[1:]]
        batches.append(pa.record_batch(columns, schema=COLUMNS))
    bucket = Bucket(frames=1, height=32, width=32)
    group = Group(source="all", bucket=bucket, rows=np.arange(count, dtype=np.uint32))
    return Index(
        table=pa.Table.from_batches(batches, COLUMNS), groups=(group,), samplers={"all": "start"},
        shares={"all": 1.0}, bad=(), left_out=LEFT_OUT_COLUMNS.empty_table(), made=time.time(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
