"""Seeded fuzz: broken copies of a small file of every format are probed and read, in a guard's process.

    python -m tests.fuzz [--files 10000] [--seed 0] [--from 0] [--decoder auto] [--keep DIR]

Every outcome must be a result or a `MediaError`, `DataError` or `ConfigError`. Prints what became of the files of
each format, and what must not happen: the process crashed (the guard caught it), a file hung, or an error came
that no one foresaw. Exit code 1 when any of these did. `--keep` saves the files that caused them. The reader's
memory is printed too: broken files must not make it grow.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sat_ext.data.decode import read_frames, read_still
from sat_ext.data.guard import Guard
from sat_ext.data.probe import probe
from sat_ext.data.sources import read_source
from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError, SatExtError
from sat_ext.types import IMAGE_EXTENSIONS
from tests.media import pattern, write_clip

TIMEOUT = 10.0  # seconds; an intact one of these files takes some milliseconds
MEASURED = 1000
TABLES = frozenset({".tar", ".parquet", ".jsonl", ".csv"})
FIT = Fit(32, 48)

# name, suffix, codec, pixel format, options
_CLIPS: list[tuple[str, str, str, str, dict[str, str]]] = [
    ("h264", ".mp4", "libx264", "yuv420p", {}),
    ("hevc", ".mp4", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
    ("mpeg4", ".mp4", "mpeg4", "yuv420p", {}),
    ("matroska", ".mkv", "libx264", "yuv420p", {}),
    ("vp9", ".webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8"}),
    ("av1", ".webm", "libsvtav1", "yuv420p", {"preset": "12"}),
    ("avi", ".avi", "mpeg4", "yuv420p", {}),
    ("prores", ".mov", "prores_ks", "yuv422p10le", {}),
    ("ffv1", ".mkv", "ffv1", "yuv420p", {}),
    ("transport", ".ts", "libx264", "yuv420p", {}),
    ("gif_clip", ".gif", "gif", "rgb8", {}),
]


def write_originals(folder: Path) -> dict[str, Path]:
    """One small intact file of each format, by name."""
    files = {}
    for name, suffix, codec, pixels, options in _CLIPS:
        path = folder / f"{name}{suffix}"
        files[name] = write_clip(path, 10, size=(64, 96), codec=codec, pixel_format=pixels, options=options, gop=5)
    still = Image.fromarray(pattern(5, 64, 96))
    for suffix, options in _STILLS.items():
        files[suffix] = folder / f"still.{suffix}"
        still.save(files[suffix], **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    still.convert("CMYK").save(files.setdefault("cmyk", folder / "cmyk.jpg"), exif=exif)
    still.quantize(16).save(files.setdefault("palette", folder / "palette.png"), transparency=3)
    frames = [Image.fromarray(pattern(n, 64, 96)) for n in range(4)]
    for suffix in ("webp", "gif", "png"):
        path = files[f"animated_{suffix}"] = folder / f"animated.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return files | _write_tables(folder, {"a.mp4": files["h264"], "b.jpg": files["jpg"], "c.png": files["png"]})


_STILLS: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 90},
    "png": {},
    "webp": {},
    "avif": {},
    "bmp": {},
    "tiff": {"compression": "tiff_lzw"},
    "gif": {},
}


def _write_tables(folder: Path, media: dict[str, Path]) -> dict[str, Path]:
    paths = {name: folder / f"table.{name}" for name in ("tar", "parquet", "jsonl", "csv")}
    with tarfile.open(paths["tar"], "w") as tar:
        for name, path in media.items():
            tar.add(path, name)
            text = tarfile.TarInfo(name[0] + ".txt")
            text.size = 7
            tar.addfile(text, io.BytesIO(b"a shape"))
    stills = [path.read_bytes() for name, path in media.items() if not name.endswith(".mp4")]
    cells = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(stills)]
    pq.write_table(pa.table({"image": cells, "text": ["a shape"] * len(cells)}), paths["parquet"])
    rows = [{"path": str(path), "caption": "a shape"} for path in media.values()]
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    paths["csv"].write_text("path,caption\n" + "".join(f"{r['path']},a shape\n" for r in rows), encoding="utf-8")
    return paths


# --- mutations ---


def _flip_bits(data: bytearray, rng: np.random.Generator) -> None:
    for place in rng.integers(0, len(data), int(rng.integers(1, 33))):
        data[place] ^= 1 << int(rng.integers(8))


def _truncate(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(0, len(data))) :]


def _insert(data: bytearray, rng: np.random.Generator) -> None:
    place = int(rng.integers(0, len(data) + 1))
    data[place:place] = rng.bytes(int(rng.integers(1, 513)))


def _swap_blocks(data: bytearray, rng: np.random.Generator) -> None:
    size = int(rng.integers(1, max(2, len(data) // 4)))
    a, b = (int(n) for n in rng.integers(0, max(1, len(data) - size), 2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _edit_header(data: bytearray, rng: np.random.Generator) -> None:
    """Sizes and counts live among the first bytes, and in MP4 among the last, in 1 to 8 bytes of either order."""
    for _ in range(int(rng.integers(1, 4))):
        width = int(rng.choice([1, 2, 4, 8]))
        place = int(rng.integers(0, min(len(data), 512))) if rng.random() < 0.7 else int(rng.integers(len(data)))
        value = _EXTREMES[int(rng.integers(len(_EXTREMES)))] & (256**width - 1)
        data[place : place + width] = value.to_bytes(width, "big" if rng.random() < 0.5 else "little")


def _zero_block(data: bytearray, rng: np.random.Generator) -> None:
    size = int(rng.integers(1, max(2, len(data) // 4)))
    place = int(rng.integers(0, len(data)))
    data[place : place + size] = bytes(len(data[place : place + size]))


_EXTREMES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    60_000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63,
    2**64 - 1,
)
_MUTATIONS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    _flip_bits, _truncate, _insert, _swap_blocks, _edit_header, _edit_header, _zero_block,
)  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A broken copy: one or two mutations."""
    copy = bytearray(data)
    for _ in range(int(rng.integers(1, 3))):
        if copy:
            _MUTATIONS[int(rng.integers(len(_MUTATIONS)))](copy, rng)
    return bytes(copy)


# --- what is done with them ---


def examine(path: str, decoder: str = "auto") -> None:
    """Read a file as training would: the first items of a table; the first, middle and last frame of a clip."""
    if Path(path).suffix in TABLES:
        for item in read_source(path)[:3]:
            _examine_media(item.path, decoder)
    else:
        _examine_media(path, decoder)


def _examine_media(path: str, decoder: str) -> None:
    info = probe(path)
    if info.frames == 1 and Path(path).suffix in IMAGE_EXTENSIONS:
        read_still(path, fit=FIT)
    else:
        read_frames(path, (0.0, info.duration / 2, info.duration), decoder=decoder, fit=FIT)


@dataclass
class Findings:
    """What became of the files, by format; and those that a person should look at."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    crashes: int = 0
    hangs: int = 0
    unforeseen: int = 0
    memory: list[int] = field(default_factory=list)  # resident bytes of the reader, every MEASURED files

    def add(self, name: str, number: int, error: SatExtError | None) -> bool:
        """Count one file; whether it is trouble."""
        outcome = "read" if error is None else "refused"
        reason = error.reason if isinstance(error, MediaError) else ""
        if "the process that read it" in reason:
            self.crashes += 1
            outcome = "crash"
        elif "reading it took longer" in reason:
            self.hangs += 1
            outcome = "hang"
        elif reason.startswith("cannot be read: "):
            self.unforeseen += 1
            outcome = "unforeseen"
        self.outcomes.setdefault(name, Counter())[outcome] += 1
        if outcome in ("read", "refused"):
            return False
        self.troubles.append(f"{name} number {number}: {reason}")
        return True


def fuzz(
    folder: Path, *, files: int, seed: int, start: int = 0, decoder: str = "auto", keep: Path | None = None
) -> Findings:
    """Break and read `files` files, in `folder`. File n of a seed is the same wherever one starts."""
    findings = Findings()
    originals = write_originals(folder)
    with Guard(examine, timeout=TIMEOUT) as guard:
        for number, name, path in _broken(folder, originals, start, files, seed):
            error = None
            try:
                guard(str(path), decoder)
            except SatExtError as caught:
                error = caught
            if findings.add(name, number, error) and keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}_{path.name}").write_bytes(path.read_bytes())
            path.unlink()
            if number % MEASURED == 0 and guard.pid is not None:
                pages = int(Path(f"/proc/{guard.pid}/statm").read_text().split()[1])
                findings.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
    return findings


def _broken(
    folder: Path, originals: dict[str, Path], start: int, files: int, seed: int
) -> Iterator[tuple[int, str, Path]]:
    names = list(originals)
    contents = {name: path.read_bytes() for name, path in originals.items()}
    (folder / "broken").mkdir(exist_ok=True)
    for number in range(start, start + files):
        name = names[number % len(names)]
        path = folder / "broken" / f"{name}{originals[name].suffix}"
        path.write_bytes(mutated(contents[name], np.random.default_rng([seed, number])))
        yield number, name, path


def main() -> int:
    """Print the table; 1 where something must be looked at."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--from", type=int, default=0, dest="start")
    parser.add_argument("--decoder", default="auto")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(
            Path(folder), files=args.files, seed=args.seed, start=args.start, decoder=args.decoder, keep=args.keep
        )
    kinds = ("read", "refused", "unforeseen", "crash", "hang")
    print(f"{'format':<16}" + "".join(f"{kind:>12}" for kind in kinds))
    for name, counts in found.outcomes.items():
        print(f"{name:<16}" + "".join(f"{counts[kind]:>12}" for kind in kinds))
    print(*found.troubles, sep="\n")
    print("MB of the reader every 1000 files:", *(round(size / 1e6) for size in found.memory))
    print(
        f"{args.files} files in {time.monotonic() - began:.0f} s: {found.crashes} crashes, {found.hangs} hangs, "
        f"{found.unforeseen} unforeseen errors"
    )
    return 1 if found.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
