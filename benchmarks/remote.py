"""Training data on S3, at the end of a line of 30 ms and 1 Gbit/s, beside the same data on the local disk.

    python benchmarks/remote.py --media FOLDER [--seconds 6] [--workers 1 4] [--json remote.json]

Clips of 20 s (49 frames from a random place, to 480x720) and photographs of 1 and 2 megapixels, each as single
objects and in tars: samples a second through a `DataLoader`, bytes and requests for each, from the server and the
line of `benchmarks/far.py`. Beside them webdataset streams the same tars, and decodes with the same code. The
first run makes the media in FOLDER (a minute).

The server and the line have one core to themselves; the column "far end" says how much of it they used, and shows
that they are not what is measured. The readers have all other cores, for local data too. So with 2 cores 4 workers
share one, and some decode while others wait; where each worker has a core of its own, see the rows of one worker.
Exit code 1 when a goal is missed. Linux.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Array, Barrier, Process
from pathlib import Path
from shutil import copyfile
from threading import Thread
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
import webdataset as wds
from clips import CLIPS, FPS, SECONDS, make_clips, make_stills
from far import RATE, Far, far_server
from report import report
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sat_ext.data.buckets import BucketConfig, StepSize
from sat_ext.data.decode import read_frames, read_still
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.data.transform import Fit
from sat_ext.data.visits import read_pixels
from sat_ext.files import fingerprint

HEIGHT, WIDTH, FRAMES, RATE_OF_MODEL = 480, 720, 49, 8
BATCH = {1: 8, FRAMES: 1}
TARS, PER_TAR = 8, {"clips": 3, "stills": 24}
SPEED, FIRST_FRAME = 0.8, 0.05  # goals: of local speed or the line's, and of a clip's bytes

Batches = Callable[[int, int], Iterator[dict[str, Any]]]  # of a worker, of so many


def main() -> int:
    """Print the tables; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--media", type=Path, required=True, help="folder of the clip and stills; made if absent")
    parser.add_argument("--seconds", type=float, default=6, help="of reading, for each row")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=Path, help="where the figures go as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
    first, *others = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["SAT_EXT_CACHE"] = stack.enter_context(tempfile.TemporaryDirectory())
        clip = next(iter(make_clips(args.media, CLIPS[1:2]).values()))
        photographs = [path for name, path in make_stills(args.media).items() if name in ("1", "2")]
        lay_out(root / "data", {"clips": [clip], "stills": photographs})
        far = stack.enter_context(far_server(root, first))
        os.environ |= {"AWS_ENDPOINT_URL": far.url, "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        os.sched_setaffinity(0, others or [first])
        line = line_speed(far)
        rows = []
        for kind in PER_TAR:
            for layout in ("objects", "tars"):
                name = f"{kind}_{layout}"
                ways = {"local": ours(f"{root}/data/{name}", kind), "S3": ours(f"s3://data/{name}", kind)}
                if layout == "tars":
                    ways["webdataset"] = streamed(far.url, kind)
                for workers in args.workers:
                    # in turns, so that what else the machine does tells on all
                    found = [
                        {w: measure(b, workers, args.seconds / 2, far) for w, b in ways.items()} for _ in range(2)
                    ]
                    rows += [
                        Row(f"{kind}, {layout}", w, workers, *np.mean([f[w] for f in found], 0)) for w in ways
                    ]
        first_frame = bytes_of_first_frame(far) / clip.stat().st_size
    columns = ["what", "from", "workers", "samples/s", "KB a sample", "requests a sample", "far end"]
    shown = [[*r.key, r.rate, r.size / 1e3, r.requests, f"{r.far:.0%}"] for r in rows]
    report("Reading from afar", columns, shown, args.json, line=line, seconds=args.seconds)
    print(f"the line and the server carry {line / 1e6:.0f} MB/s of {RATE / 1e6:.0f}\n")
    goals = list(goals_of(rows, line, max(args.workers)))
    goals.append(("bytes of a first frame, of a 20 s clip", f"{first_frame:.1%}", f"<= {FIRST_FRAME:.0%}",
                  first_frame <= FIRST_FRAME))  # fmt: skip
    report("Goals", ["figure", "measured", "goal", "result"], goals)
    return 0 if all(met for *_, met in goals) else 1


@dataclass
class Row:
    """Samples a second, and for each its bytes and requests; `far` is the far end's part of its core."""

    what: str
    way: str
    workers: int
    rate: float
    size: float
    requests: float
    far: float

    @property
    def key(self) -> tuple[str, str, int]:
        """What is compared."""
        return self.what, self.way, self.workers


def goals_of(rows: list[Row], line: float, workers: int) -> Iterator[tuple[str, str, str, bool]]:
    """Of local speed or, where that is less, of what the line carries."""
    by_key = {row.key: row for row in rows}
    for what in dict.fromkeys(row.what for row in rows):
        local, far = by_key[what, "local", workers], by_key[what, "S3", workers]
        share = far.rate / min(local.rate, line / far.size)
        yield f"{what}: speed, {workers} workers", f"{share:.0%}", f">= {SPEED:.0%}", bool(share >= SPEED)


def lay_out(bucket: Path, media: dict[str, list[Path]]) -> None:
    """Copies of the media with captions, as files and in tars."""
    for kind, paths in media.items():
        objects, tars = bucket / f"{kind}_objects", bucket / f"{kind}_tars"
        objects.mkdir(parents=True)
        tars.mkdir()
        for number in range(TARS):
            with tarfile.open(tars / f"{number}.tar", "w") as tar:
                for n in range(PER_TAR[kind]):
                    path = paths[n % len(paths)]
                    file = objects / f"{number}_{n:02}{path.suffix}"
                    copyfile(path, file)
                    file.with_suffix(".txt").write_text(f"{kind} {n}")
                    for each in (file, file.with_suffix(".txt")):
                        tar.add(each, each.name)


def ours(path: str, kind: str) -> Batches:
    """What training reads."""
    frames = FRAMES if kind == "clips" else 1
    config = DataConfig(
        fps=RATE_OF_MODEL, video_size=(HEIGHT, WIDTH), buckets=BucketConfig(frames=(frames,)), batch=BATCH
    )
    index = build_index([SourceConfig(path=path)], config)
    assert not index.bad, index.bad
    size = StepSize.of({bucket: BATCH[bucket.frames] for bucket in config.make_buckets()})
    stream = JointStream(index, config, size=size, world=1, dtype=torch.uint8)
    return lambda worker, workers: stream.batches(start=0, rank=0, worker=worker, workers=workers)


def streamed(url: str, kind: str) -> Batches:
    """The tars by webdataset, which fetches them by curl from their start to their end."""
    urls = [f"{url}/data/{kind}_tars/{number}.tar" for number in range(TARS)]
    fit = Fit(HEIGHT, WIDTH)

    def pixels(sample: dict[str, Any], rng: np.random.Generator, file: Path) -> np.ndarray:
        file.write_bytes(sample["mp4" if kind == "clips" else "jpg"])
        if kind == "stills":
            return read_still(str(file), fit=fit)
        start = rng.uniform(0, SECONDS - 1 / FPS - FRAMES / RATE_OF_MODEL)
        return read_frames(str(file), [start + k / RATE_OF_MODEL for k in range(FRAMES)], fit=fit)

    def batches(worker: int, workers: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(worker)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            file, held = Path(folder) / "sample", []
            for sample in wds.WebDataset(urls, shardshuffle=TARS).repeat():
                held.append(torch.from_numpy(pixels(sample, rng, file)))
                if len(held) == BATCH[len(held[0])]:
                    yield {"mp4": torch.stack(held), "txt": [""] * len(held)}
                    held = []

    return batches


class Timed(IterableDataset[dict[str, Any]]):
    """The batches of each worker, after a first one, until the time is up."""

    def __init__(self, batches: Batches, workers: int, seconds: float) -> None:
        self.batches, self.seconds = batches, seconds
        self.gate = Barrier(workers + 1)
        self.counts, self.rates = Array("i", workers), Array("d", workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        batches = self.batches(worker.id, worker.num_workers)
        yield next(batches)  # which starts processes and connections
        self.gate.wait()
        began, spent = time.monotonic(), 0.0
        while spent < self.seconds:
            batch = next(batches)
            spent = time.monotonic() - began
            self.counts[worker.id] += len(batch["txt"])
            yield batch
        self.rates[worker.id] = self.counts[worker.id] / spent


def measure(batches: Batches, workers: int, seconds: float, far: Far) -> tuple[float, float, float, float]:
    """Samples a second of all workers; bytes and requests a sample, and the far end's part of its core."""
    timed = Timed(batches, workers, seconds)
    loader = iter(DataLoader(timed, batch_size=None, num_workers=workers))
    for _ in range(workers):
        next(loader)
    timed.gate.wait()
    far.reset()
    began = time.monotonic()
    for _ in loader:
        pass
    count = sum(timed.counts)
    busy = far.cpu / (time.monotonic() - began)
    return sum(timed.rates), far.sent.value / count, far.asked.value / count, busy


def line_speed(far: Far) -> float:
    """Bytes a second of four plain downloads at once."""
    urls = [f"{far.url}/data/clips_tars/{number}.tar" for number in range(4)]

    def download(url: str) -> None:
        while time.monotonic() < end:
            with urlopen(url) as answer:
                while answer.read(1 << 20):
                    pass

    far.reset()
    began = time.monotonic()
    end = began + 3
    threads = [Thread(target=download, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return far.sent.value / (time.monotonic() - began)


def bytes_of_first_frame(far: Far) -> int:
    """What a clip's first frame takes, headers included."""
    url = "s3://data/clips_objects/0_00.mp4"
    far.reset()
    process = Process(target=read_first_frame, args=(url,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return int(far.sent.value)


def read_first_frame(url: str) -> None:
    """As training reads it."""
    read_pixels(url, [0.0], "auto", Fit(HEIGHT, WIDTH), (fingerprint(url), time.time()))


if __name__ == "__main__":
    sys.exit(main())
