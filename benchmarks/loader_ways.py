"""What the loader's benchmark runs, each in a process of its own: a way of reading, on one core, its cost as JSON.

python benchmarks/loader_ways.py WAY PATH REPEATS
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sat_ext.data.buckets import BucketConfig, StepSize
from sat_ext.data.decode import read_frames, read_still
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.data.transform import Fit
from sat_ext.media import open_video
from sat_ext.types import TIME_TOLERANCE

HEIGHT, WIDTH, FRAMES, FPS = 480, 720, 49, 8
TIMES = [k / FPS for k in range(FRAMES)]


class Described(Dataset[Tensor]):
    """CogVideo's data set class, reimplemented from its description.

    It opens the whole file, fetches every frame from start to end, picks some of them by an integer stride,
    resizes these in float32 (bicubic, antialiased) until they cover the target, cuts out the centre and
    normalises. The reader lives as long as the call.
    """

    def __init__(self, path: str, length: int) -> None:
        self.path, self.length = path, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        reader = decord.VideoReader(self.path)
        end = min(len(reader), int(FRAMES / FPS * reader.get_avg_fps()))
        frames = torch.from_numpy(reader.get_batch(np.arange(end)).asnumpy())
        picked = frames[:: max(1, end // FRAMES)][:FRAMES]
        return _resize_float(picked.permute(0, 3, 1, 2)) / 127.5 - 1


class Ours(IterableDataset[dict[str, Any]]):
    """Batches of `sat_ext`: the stream that training reads, of one clip from its start."""

    def __init__(self, path: str, length: int, dtype: torch.dtype) -> None:
        self.length = length
        config = DataConfig(
            fps=FPS,
            video_size=(HEIGHT, WIDTH),
            buckets=BucketConfig(frames=(FRAMES,)),
            batch={FRAMES: 1},
            allowed_roots=(str(Path(path).resolve().parent),),
        )
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "clips.jsonl"
            table.write_text(json.dumps({"path": str(Path(path).resolve()), "caption": "a caption"}) + "\n")
            index = build_index([SourceConfig(path=str(table), sampler="start")], config)
        size = StepSize.of(dict.fromkeys(config.make_buckets(), 1))
        self.stream = JointStream(index, config, size=size, world=1, dtype=dtype)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self.stream.batches(start=0, rank=0), self.length)


class Nothing(Dataset[int]):
    """What starting a worker costs by itself."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


def clip(path: str, repeats: int) -> dict[str, float]:
    """CPU seconds for a clip through a data worker, ours and CogVideo's class; and of libavcodec alone.

    Ours and libavcodec take turns, three times, so that what else the machine does tells on both. A worker's start
    is not counted: of ours, what the first clip takes; of CogVideo's class, what a worker without work takes.
    """
    ours, floor = [], []
    for _ in range(3):
        first, _ = through_a_worker(Ours(path, 1, torch.uint8), None)
        more, size = through_a_worker(Ours(path, repeats + 1, torch.uint8), None)
        ours.append((more - first) / repeats)
        floor.append(libavcodec(path, repeats))
    described, float_size = through_a_worker(Described(path, 1), 1)
    return {
        "ours": float(np.median(ours)),
        "libavcodec": float(np.median(floor)),
        "described": described - through_a_worker(Nothing(), None)[0],
        "uint8_bytes": size,
        "bfloat16_bytes": through_a_worker(Ours(path, 1, torch.bfloat16), None)[1],
        "float32_bytes": float_size,
    }


def through_a_worker(dataset: Dataset[Any], batch_size: int | None) -> tuple[float, int]:
    """CPU seconds of the worker, its guard, and of the process that takes the batches; bytes of a batch."""
    before = _cpu(resource.RUSAGE_SELF) + _cpu(resource.RUSAGE_CHILDREN)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=1, prefetch_factor=1)
    size = 0
    for batch in loader:
        pixels = batch["mp4"] if isinstance(batch, dict) else batch
        size = pixels.nbytes if isinstance(pixels, Tensor) else 0
        del batch, pixels
    del loader
    return _cpu(resource.RUSAGE_SELF) + _cpu(resource.RUSAGE_CHILDREN) - before, size


def memory_of_a_worker(dataset: Dataset[Any], batch_size: int | None) -> dict[str, float]:
    """The most memory that a worker and its guard hold at a time, pages that they share counted once (Linux)."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            pages = [_pages(pid) for pid in _descendants(os.getpid())]
            if pages:
                peak = max(peak, sum(private for private, _ in pages) + max(shared for _, shared in pages))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in DataLoader(dataset, batch_size=batch_size, num_workers=1, prefetch_factor=1):
        pass
    done.set()
    watcher.join()
    return {"peak": float(peak)}


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _pages(pid: int) -> tuple[int, int]:
    """Bytes that a process has for itself, and that it shares."""
    amounts = {"Private": 0, "Shared": 0}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            kind = line.split("_")[0]
            if kind in amounts:
                amounts[kind] += 1024 * int(line.split()[1])
    return amounts["Private"], amounts["Shared"]


def libavcodec(path: str, repeats: int) -> float:
    """CPU seconds to decode what must be decoded for the wanted frames, without conversion: the floor."""

    def once() -> None:
        with open_video(path) as (container, stream):
            needed = _needed_packets(container, stream)
            context = stream.codec_context
            start = time.process_time()
            for packet, wanted in needed:
                context.skip_frame = "DEFAULT" if wanted else "NONREF"
                packet.decode()
            context.decode(None)
            spent.append(time.process_time() - start)

    spent: list[float] = []
    for _ in range(repeats):
        once()
    return float(np.median(spent))


def _needed_packets(container: Any, stream: Any) -> list[tuple[av.Packet, bool]]:
    """All packets up to the last wanted one in decoding order, and whether each is wanted."""
    packets = [p for p in container.demux(stream) if p.size]
    starts = np.sort([float(p.pts * stream.time_base) for p in packets])
    shown = {round(starts[np.searchsorted(starts, t + TIME_TOLERANCE, side="right") - 1], 6) for t in TIMES}
    wanted = [round(float(p.pts * stream.time_base), 6) in shown for p in packets]
    last = max(number for number, is_wanted in enumerate(wanted) if is_wanted)
    container.seek(0, stream=stream)
    return list(zip(packets[: last + 1], wanted))


def first_frames(path: str, repeats: int) -> dict[str, float]:
    """CPU seconds for the first frame as a still, ours and decord's; bytes that ours reads, and that it must."""
    with open_video(path, headers_only=True) as (container, stream):
        samples = [entry.size for entry in stream.index_entries]
        least = container.size - sum(samples) + samples[0]  # all of the file that is no sample, and the first one
    ours, theirs = timed(path, repeats, first_frame, first_frame_decord)
    before = _bytes_read()
    first_frame(path)
    return {"ours": ours, "decord": theirs, "read": _bytes_read() - before, "least": least}


def stills(path: str, repeats: int) -> dict[str, float]:
    """CPU seconds for a picture, ours and Pillow's with float32; and decibels between the two."""
    ours, theirs = timed(path, repeats, still, still_pillow)
    return {"ours": ours, "pillow": theirs, "psnr": likeness(path)}


def first_frame(path: str) -> None:
    """The first frame as a still, by the stages of `sat_ext.data`."""
    read_frames(path, [0.0], fit=Fit(HEIGHT, WIDTH))


def first_frame_decord(path: str) -> None:
    """The first frame by decord, resized in float32."""
    pixels = torch.from_numpy(decord.VideoReader(path, num_threads=1)[0].asnumpy())
    _resize_float(pixels.permute(2, 0, 1)[None])


def still(path: str) -> Tensor:
    """A picture, by the stages of `sat_ext.data`."""
    return torch.from_numpy(read_still(path, fit=Fit(HEIGHT, WIDTH)))


def still_pillow(path: str) -> Tensor:
    """A picture decoded by Pillow as a whole and resized in float32."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return _resize_float(pixels.permute(2, 0, 1)[None])


def likeness(path: str) -> float:
    """Decibels between ours and Pillow's whole decode of the same part of the picture, resized in float32."""
    fit = Fit(HEIGHT, WIDTH)
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    left, top, width, height = fit._box(pixels.shape[1], pixels.shape[0])
    box = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)[None].float()
    exact = F.interpolate(box, size=(HEIGHT, WIDTH), mode="bicubic", antialias=True).clamp(0, 255)
    error = float((still(path).float() - exact).square().mean())
    return 10 * math.log10(255**2 / error)


def _resize_float(frames: Tensor) -> Tensor:
    """uint8 (T, 3, H, W) to float32, resized until it covers the target, and its centre."""
    height, width = frames.shape[2:]
    scale = max(HEIGHT / height, WIDTH / width)
    size = (max(HEIGHT, round(height * scale)), max(WIDTH, round(width * scale)))
    large = F.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - HEIGHT) // 2, (size[1] - WIDTH) // 2
    return large[:, :, top : top + HEIGHT, left : left + WIDTH].clamp(0, 255)


def timed(path: str, repeats: int, *calls: Callable[[str], object]) -> list[float]:
    """Median CPU seconds of each, which take turns; the first turn, which warms up, is not counted."""
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for times, call in zip(spent, calls):
            start = time.process_time()
            call(path)
            times.append(time.process_time() - start)
    return [float(np.median(times[1:])) for times in spent]


def _bytes_read() -> int:
    """Bytes that this process has asked the system for (Linux)."""
    with open("/proc/self/io", encoding="ascii") as file:
        return int(file.readline().split()[1])


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def main(way: str, path: str, repeats: int) -> dict[str, float]:
    """Run one way, on one core."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "clip": lambda: clip(path, repeats),
        "described_memory": lambda: memory_of_a_worker(Described(path, repeats), 1),
        "ours_memory": lambda: memory_of_a_worker(Ours(path, repeats, torch.uint8), None),
        "first_frame": lambda: first_frames(path, repeats),
        "still": lambda: stills(path, repeats),
    }
    return ways[way]()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
