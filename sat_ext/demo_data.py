"""A small real data set to try things on: flat coloured shapes, moving in clips and at rest in stills.

One sees at a glance whether a caption is right, and a model of a million parameters learns it in minutes. The
files are as mixed as a user's own: H.264 clips of several sizes, lengths and frame rates, JPEG, PNG and WebP
stills, and videos of a single frame."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sat_ext.errors import DataError
from sat_ext.media import write_video

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (216, 32, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 170, 70),
    "blue": (40, 90, 225),
    "purple": (150, 50, 180),
}
BACKGROUNDS = {"black": (24, 24, 30), "white": (232, 232, 226)}
MOTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}

# (width, height); the shape stays inside the centre square, so that no crop to another format hides it.
CLIP_SIZES = ((96, 96), (128, 96), (96, 128), (160, 120), (128, 128), (120, 160), (176, 96))
STILL_SIZES = ((96, 96), (160, 120), (120, 160), (256, 256), (320, 240), (240, 320), (400, 224))
FRAME_RATES = (8, 12, 16, 24, 25, 30)
SECONDS = (1.125, 2.0)  # at least 9 frames at 8 fps, the first and the last included
STILL_SUFFIXES = (".jpg", ".png", ".webp", ".jpg", ".png", ".webp", ".jpg", ".mp4")  # in turn
SPEED = (0.34, 0.40)  # of the short side a second: 9 frames at 8 fps cross about a third of the picture
DIAMETER = (0.5, 0.6)  # of the short side: five or six latents, which can tell a circle from a square
PLACE = (0.43, 0.57)  # of the centre square's side; with half of DIAMETER around it, never over the edge
OVERSAMPLING = 4  # drawn larger by this and scaled down, for smooth edges and motion by fractions of a pixel

README = """Demo data of sat_ext: coloured shapes on plain backgrounds, with captions.

train/videos/   {clips} H.264 clips of 5 to 60 frames, 8 to 30 frames a second; every eighth is under 9 frames
train/labels/   their captions, a text file for each clip
train/stills/   {stills} stills (JPEG, PNG, WebP, and videos of one frame), each beside its caption
heldout/        the same from another draw, {held_out} clips and {held_out} stills, to measure the loss on

Any of these folders, train/ as a whole too, can be named as a source.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One shape on a background. Lengths are fractions of the picture's short side, from its centre square's upper
    left corner; `velocity` is per second, and (0, 0) in a still."""

    shape: str
    colour: str
    background: str
    direction: str | None  # None in a still
    size: tuple[int, int]  # width and height in pixels
    diameter: float
    start: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    frames: int = 1
    fps: int = FRAME_RATES[0]

    @property
    def caption(self) -> str:
        """The scene in words."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        motion = f" moving {self.direction}" if self.direction else ""
        return f"{article} {self.colour} {self.shape}{motion} on {self.background}"

    def draw(self, seconds: float = 0.0) -> Image.Image:
        """The picture at a time, RGB."""
        width, height = (side * OVERSAMPLING for side in self.size)
        scale = min(width, height)
        left, top = (width - scale) / 2, (height - scale) / 2
        x = left + (self.start[0] + self.velocity[0] * seconds) * scale
        y = top + (self.start[1] + self.velocity[1] * seconds) * scale
        r = self.diameter / 2 * scale
        image = Image.new("RGB", (width, height), BACKGROUNDS[self.background])
        pen, fill = ImageDraw.Draw(image), COLOURS[self.colour]
        if self.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif self.shape == "square":
            side = r * 0.9  # of about the circle's area
            pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
        else:
            pen.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=fill)
        return image.reduce(OVERSAMPLING)


def write_demo(
    folder: Path, *, clips: int = 48, stills: int = 48, held_out: int = 16, seed: int = 0,
    progress: Callable[[list[tuple[Path, Scene]]], Iterable[tuple[Path, Scene]]] = iter,
) -> None:  # fmt: skip
    """Create the data set in `folder`; the same `seed` gives the same pixels and captions.

    `held_out` is the number of clips, and of stills, under heldout/. `progress` wraps the iteration over all
    files. Raises `DataError` if `folder` is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: something is there already; name a folder that is new or empty.")
    for part in ("train", "heldout"):
        for name in ("videos", "labels", "stills"):
            (folder / part / name).mkdir(parents=True)
    readme = README.format(clips=clips, stills=stills, held_out=held_out)
    (folder / "README.txt").write_text(readme, encoding="utf-8")
    train = _files(folder / "train", clips, stills, np.random.default_rng([seed, 0]), short_every=8)
    # No short clips here, so that a model for 9 frames at 8 fps is measured on every clip as a clip.
    heldout = _files(folder / "heldout", held_out, held_out, np.random.default_rng([seed, 1]), short_every=None)
    for path, scene in progress([*train, *heldout]):
        pictures = [scene.draw(k / scene.fps) for k in range(scene.frames)]
        if path.suffix == ".mp4":
            write_video(path, [np.asarray(picture) for picture in pictures], scene.fps, crf=16)
        else:
            pictures[0].save(path, quality=92)  # PNG has no quality, and Pillow ignores it
        labels = path.parent if path.parent.name == "stills" else path.parents[1] / "labels"
        (labels / f"{path.stem}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def _files(
    folder: Path, clips: int, stills: int, rng: np.random.Generator, *, short_every: int | None
) -> Iterator[tuple[Path, Scene]]:
    """`clips` in videos/ (one in `short_every` of fewer than 9 frames), and `stills` in stills/."""
    for i, scene in enumerate(_scenes(rng, clips, CLIP_SIZES, tuple(MOTIONS))):
        is_short = short_every is not None and i % short_every == short_every - 1
        yield folder / "videos" / f"{i:03d}_{scene.colour}_{scene.shape}.mp4", _moving(scene, i, is_short, rng)
    for i, scene in enumerate(_scenes(rng, stills, STILL_SIZES, (None,))):
        suffix = STILL_SUFFIXES[i % len(STILL_SUFFIXES)]
        yield folder / "stills" / f"{i:03d}_{scene.colour}_{scene.shape}{suffix}", scene


def _scenes(
    rng: np.random.Generator, count: int, sizes: Sequence[tuple[int, int]], directions: Sequence[str | None]
) -> Iterator[Scene]:
    """`count` scenes at rest around the middle; every value of an attribute equally often, give or take one."""
    values: dict[str, Sequence[Any]] = {
        "shape": SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS), "direction": directions,
        "size": sizes,
    }  # fmt: skip
    # Shuffled each for itself: combined in a fixed order, red things would always be circles.
    shuffled = [[v[int(i) % len(v)] for i in rng.permutation(count)] for v in values.values()]
    for attributes in zip(*shuffled):
        diameter = float(rng.uniform(*DIAMETER))
        x, y = (float(v) for v in rng.uniform(*PLACE, size=2))
        yield Scene(**dict(zip(values, attributes)), diameter=diameter, start=(x, y))


def _moving(scene: Scene, index: int, is_short: bool, rng: np.random.Generator) -> Scene:
    """The scene in motion, with the whole shape in the centre square throughout."""
    assert scene.direction is not None
    if is_short:
        fps, frames = 8, int(rng.integers(5, 9))  # too few for a bucket of 9 frames, enough to see a movement
    else:
        fps = FRAME_RATES[index % len(FRAME_RATES)]
        frames = int(rng.integers(math.ceil(SECONDS[0] * fps), int(SECONDS[1] * fps) + 1))
    seconds = (frames - 1) / fps  # from the first frame's start to the last's
    room = 1 - scene.diameter
    path = min(float(rng.uniform(*SPEED)) * seconds, room)
    along = scene.diameter / 2 + float(rng.uniform(0, room - path))  # the end of the path that is nearer to 0
    step_x, step_y = MOTIONS[scene.direction]
    first = along if step_x + step_y > 0 else along + path
    start = (first, scene.start[1]) if step_x else (scene.start[0], first)
    velocity = (step_x * path / seconds, step_y * path / seconds)
    return replace(scene, start=start, velocity=velocity, frames=frames, fps=fps)
