"""Memory of a data worker and its reading process over many samples: it must stay flat.

    python benchmarks/soak.py [--samples 20000] [--every 1000] [--json soak.json]

Small clips (H.264, HEVC, VP9, MPEG-4, GIF) and stills (JPEG, PNG, WebP), some of them broken after they were
indexed, go through the worker of a DataLoader. Exit code 1 when resident memory at the end is more than 5 % and
20 MB above what it was after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import torch
from torch.utils.data import DataLoader, IterableDataset

from sat_ext.config import load
from sat_ext.data.buckets import StepSize
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.demo_data import write_demo

# codec, suffix, pixel format
COPIES = [
    ("libx265", ".mp4", "yuv420p10le"),
    ("libvpx-vp9", ".webm", "yuv420p"),
    ("mpeg4", ".avi", "yuv420p"),
    ("gif", ".gif", "rgb8"),
]
WORST_PART, WORST_BYTES = 0.05, 20e6


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The stream as SAT's loader sees it, by one worker."""

    def __init__(self, stream: JointStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.stream.batches(start=0, rank=0)


def write_files(root: Path) -> None:
    """Fifty clips in several formats and 24 stills, with captions."""
    write_demo(root, clips=30, stills=24, held_out=1)
    clips = sorted((root / "train" / "videos").glob("*.mp4"))
    for number, clip in enumerate(clips[:20]):
        codec, suffix, pixel_format = COPIES[number % len(COPIES)]
        target = clip.with_name(f"{clip.stem}_{codec}{suffix}")
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        with av.open(str(clip)) as reader, av.open(str(target), "w") as writer:
            source = reader.streams.video[0]
            stream = writer.add_stream(codec, rate=source.average_rate, options=options)
            stream.width, stream.height, stream.pix_fmt = source.width, source.height, pixel_format
            for frame in reader.decode(source):
                frame.pict_type = av.video.frame.PictureType.NONE
                writer.mux(stream.encode(frame))
            writer.mux(stream.encode(None))
        captions = root / "train" / "labels"
        (captions / f"{target.stem}.txt").write_bytes((captions / f"{clip.stem}.txt").read_bytes())


def spoil(stream: JointStream, every: int = 6) -> int:
    """Break every so many files of the index: truncated, emptied or deleted, in turn. How many."""
    rows = range(0, stream.index.table.num_rows, every)
    for number, row in enumerate(rows):
        path = Path(stream.index.item(row)[0].path)
        if number % 3 == 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif number % 3 == 1:
            path.write_bytes(b"")
        else:
            path.unlink()
    return len(rows)


def resident(pid: int) -> int:
    """Resident bytes of a process, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def children(pid: int) -> list[int]:
    """The processes that a process forked."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def soak(root: Path, samples: int, every: int) -> list[dict[str, float]]:
    """Samples and bytes, every so many samples."""
    write_files(root)
    data = load(
        DataConfig,
        {"video_size": [64, 96], "buckets": {"frames": [1, 9]}, "short_clips": "loop"},
        "data.params",
    )
    index = build_index([SourceConfig(path=str(root / "train"))], data)
    stream = JointStream(
        index, data, size=StepSize.of(dict.fromkeys(data.make_buckets(), 4)), world=1, dtype=torch.uint8
    )
    broken = spoil(stream)
    print(f"{index.summary()}; {broken} broken since")
    loader = iter(DataLoader(Batches(stream), batch_size=None, num_workers=1))
    (worker,) = loader._workers  # type: ignore[attr-defined]
    rows: list[dict[str, float]] = []
    seen, due = 0, every
    print(f"{'samples':>8} {'worker MB':>10} {'reader MB':>10} {'sum MB':>8}")
    while seen < samples:
        seen += len(next(loader)["txt"])
        if seen >= due:
            row = {
                "samples": seen,
                "worker": resident(worker.pid),
                "reader": sum(map(resident, children(worker.pid))),
            }
            row["sum"] = row["worker"] + row["reader"]
            rows.append(row)
            print(
                f"{seen:>8} "
                + f"{row['worker'] / 1e6:>10.1f} {row['reader'] / 1e6:>10.1f} {row['sum'] / 1e6:>8.1f}"
            )
            due += every
    return rows


def main() -> int:
    """Print the table; 1 when memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(Path(folder), args.samples, args.every)
    first = next(row for row in rows if row["samples"] >= args.samples / 10)
    growth = rows[-1]["sum"] - first["sum"]
    flat = growth <= max(WORST_PART * first["sum"], WORST_BYTES)
    verdict = "flat" if flat else "GROWING"
    print(f"{verdict}: {growth / 1e6:+.1f} MB from sample {first['samples']} to {rows[-1]['samples']}")
    if args.json:
        args.json.write_text(json.dumps({"flat": flat, "growth": growth, "rows": rows}, indent=1))
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
