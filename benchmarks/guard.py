"""CPU time of reading files in a guard's process, beside reading them directly.

    python benchmarks/guard.py FILE... [--frames 49] [--size 480 720] [--repeats 10] [--json guard.json]

Both ways in turn, the same pixels; of the guard the time of both processes counts. What the guard adds is also
measured by itself, with pixels that are there already: on a busy machine only that is exact. Linux only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from sat_ext.data.guard import Guard
from sat_ext.data.probe import probe
from sat_ext.data.transform import Fit
from sat_ext.data.visits import read_pixels
from sat_ext.files import fingerprint


def cpu_here() -> float:
    """Seconds of CPU time of this process."""
    return time.process_time()


def cpu_of(pid: int) -> float:
    """Seconds of CPU time of another process, in its one thread."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def compare(path: str, frames: int, fit: Fit, repeats: int) -> dict[str, float]:
    """Medians in milliseconds."""
    times = None if probe(path).frames == 1 else tuple(k / 8 for k in range(frames))
    request = (path, times, "auto", fit, (fingerprint(path), time.time()))
    pixels = read_pixels(*request)
    with (
        Guard(read_pixels, timeout=600, capacity=pixels.nbytes) as reader,
        Guard(lambda *_: pixels, timeout=600, capacity=pixels.nbytes) as echo,
    ):
        assert np.array_equal(reader(*request), pixels)
        rows = [
            (measure(None, read_pixels, request), measure(reader, reader, request), measure(echo, echo, request))
            for _ in range(repeats)
        ]
    direct, guarded, added = (1e3 * median(column) for column in zip(*rows))
    return {"direct_ms": direct, "guarded_ms": guarded, "added_ms": added, "added_part": added / direct}


def measure(guard: Guard[Any] | None, read: Callable[..., Any], request: tuple[Any, ...]) -> float:
    """Seconds of CPU time of one reading, here and in the guard's process."""
    if guard is None:
        began = cpu_here()
        read(*request)
        return cpu_here() - began
    guard.release()
    if guard.pid is None:
        guard(*request)  # the first call forks, and loads what is loaded lazily
        guard.release()
    assert guard.pid is not None
    began = cpu_here() + cpu_of(guard.pid)
    read(*request)
    return cpu_here() + cpu_of(guard.pid) - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 720))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'file':<32}{'direct ms':>10}{'guarded ms':>11}{'added ms':>9}{'added':>7}")
    rows = {}
    for path in args.files:
        row = rows[path] = compare(path, args.frames, Fit(*args.size), args.repeats)
        print(
            f"{Path(path).name:<32}{row['direct_ms']:>10.1f}{row['guarded_ms']:>11.1f}{row['added_ms']:>9.2f}"
            f"{row['added_part']:>7.1%}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
