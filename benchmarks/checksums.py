"""What checking checksums adds to reading: a checkpoint's file, a cached clip and still, an index of a data set.

    python benchmarks/checksums.py [--megabytes 1024]

Prints milliseconds of CPU time (which other work on the machine does not change), files in the page cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sat_ext.checkpoint.reading import broken_record
from sat_ext.latents.checksummed import checksum_of
from sat_ext.latents.store import Entry, LatentStore, write_latents


def main() -> None:
    """One line for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="of the checkpoint's file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "weights.pt"
        torch.save({"module": {str(i): torch.randn(1 << 20) for i in range(options.megabytes // 4)}}, file)
        assert zipfile.is_zipfile(file)
        load = cpu_ms(lambda: torch.load(file, weights_only=True))
        show("checkpoint", load, cpu_ms(lambda: broken_record(file)))
        for kind, frames, count in (("cached clip", 13, 48), ("cached still", 1, 300)):
            samples = [sample(number, frames) for number in range(count)]
            write_latents(folder, samples)
            whole = cpu_ms(partial(read_all, LatentStore(folder), samples)) / count
            check = cpu_ms(partial(check_all, samples)) / count
            show(kind, whole - check, check)


Samples = list[tuple[Entry, dict[str, torch.Tensor]]]


def read_all(store: LatentStore, samples: Samples) -> None:
    """From the cache."""
    for entry, _ in samples:
        store.read(entry.key)


def check_all(samples: Samples) -> None:
    """What reading them does beside."""
    for _, parts in samples:
        for value in parts.values():
            checksum_of(value)


def sample(number: int, frames: int) -> tuple[Entry, dict[str, torch.Tensor]]:
    """One of 480x720 in bfloat16, as 5B-I2V's: a mean, a deviation, and of clips five conditions."""
    parts = {part: torch.randn(frames, 16, 60, 90).bfloat16() for part in ("mean", "std")}
    if frames > 1:
        parts |= {"first": parts["mean"][:1].clone(), "noisy": torch.randn(4, 1, 16, 60, 90).bfloat16()}
    return Entry(name=str(number), media="", clip="", size=str(frames), encoder=""), parts


def cpu_ms(do: Callable[[], Any], times: int = 5) -> float:
    """The median."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        do()
        taken.append((time.process_time() - start) * 1000)
    return sorted(taken)[times // 2]


def show(kind: str, read: float, check: float) -> None:
    """The ratio is that of checking to reading."""
    print(f"{kind}: read {read:.2f} ms, check {check:.2f} ms, ratio {check / read:.2f}")


if __name__ == "__main__":
    main()
