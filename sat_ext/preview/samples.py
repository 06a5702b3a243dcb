"""Samples of the real stream as pictures: what the model gets after decoding, crop and resize."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image

from sat_ext.data.parts import part_info
from sat_ext.data.stream import JointStream
from sat_ext.errors import DataError
from sat_ext.pixels import to_uint8
from sat_ext.preview.report import Frame, Shown, webp
from sat_ext.types import Bucket, MediaInfo, Sample

STRIP_FRAMES = 8
STILL_SIDE, STRIP_SIDE = 360, 180  # pixels: about twice what the page gives them, for fine screens
QUALITY = 72  # WebP's, of 100: at these sizes its faults are below what the eye finds
MOST_CAPTION = 5000  # letters of it that are printed
_TRIES = 4  # samples read for one that is shown


def show(stream: JointStream, bucket: Bucket, number: int) -> tuple[list[Shown], str]:
    """The first `number` records that training takes from a bucket, from each source in turn, and a remark.

    If too many of its files cannot be read, the remark says why samples are missing."""
    shown: list[Shown] = []
    seen = set()
    for cell, position in islice(_turns(stream, bucket), _TRIES * number):
        try:
            sample = stream.sample(cell, position)
        except DataError as error:
            return shown, str(error)  # the rest of the page is still worth having
        # The same file again: another window of a long clip, or a repeat for its weight.
        if (sample.source, sample.key) in seen:
            continue
        seen.add((sample.source, sample.key))
        shown.append(_shown(sample, _origin(stream, cell, position, sample)))
        if len(shown) == number:
            break
    return shown, ""


def _turns(stream: JointStream, bucket: Bucket) -> Iterator[tuple[int, int]]:
    """Cells and positions, one of each cell after the other."""
    cells = [(i, c.records) for i, c in enumerate(stream.schedule.cells) if c.bucket == bucket]
    for position in range(max(records for _, records in cells)):
        yield from ((cell, position) for cell, records in cells if position < records)


def _shown(sample: Sample, origin: str) -> Shown:
    pixels = to_uint8(sample.pixels)
    still = len(pixels) == 1
    wanted = np.linspace(0, len(pixels) - 1, min(STRIP_FRAMES, len(pixels))).round().astype(int)
    frames = [
        _frame(
            pixels[i],
            STILL_SIDE if still else STRIP_SIDE,
            label="" if still else f"{i / max(sample.fps, 1):.1f} s",
            repeated=bool(i >= sample.num_frames),
        )
        for i in wanted
    ]
    caption = sample.caption
    if len(caption) > MOST_CAPTION:
        caption = f"{caption[:MOST_CAPTION]} … ({len(sample.caption):,} letters)"
    return Shown(frames=frames, caption=caption, source=sample.source, key=sample.key, origin=origin)


def _frame(pixels: np.ndarray, longest: int, *, label: str, repeated: bool) -> Frame:
    """uint8 (H, W, 3) in a data: URI, its longer side at most `longest` pixels; small ones are enlarged."""
    image = Image.fromarray(pixels)
    factor = longest // max(image.size)
    if factor > 1:  # of a tiny bucket: show the pixels, which is what the model sees
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return Frame(uri=webp(image, QUALITY), width=image.width, height=image.height, label=label, repeated=repeated)


def _origin(stream: JointStream, cell: int, position: int, sample: Sample) -> str:
    """What the file is and what was done to it, or that it replaces another."""
    group = stream.index.groups[cell]
    row = int(group.rows[stream.schedule.records(cell, np.array([position]))[0]])
    item, info = stream.index.item(row)
    if item.key != sample.key:
        return "replaces a file that cannot be read"
    return describe(part_info(item, info), group.bucket)


def describe(info: MediaInfo, bucket: Bucket) -> str:
    r"""What becomes of a file in a bucket.

    >>> clip = MediaInfo(width=1920, height=1080, frames=300, fps=30.0, duration=10.0, codec="h264")
    >>> describe(clip, Bucket(frames=49, height=480, width=720))
    'from 1920×1080, 30 fps, 10.0 s; 16\xa0% cut at the sides; shrunk to 44\xa0%'
    """
    text = f"from {info.width}×{info.height}"
    if info.frames > 1:
        text += f", {info.fps:.4g} fps, {info.duration:.1f} s"
    shape = (info.width / info.height) / (bucket.width / bucket.height)
    cut = 1 - min(shape, 1 / shape)
    if cut >= 0.005:
        text += f"; {100 * cut:.0f}\u00a0% cut {'at the sides' if shape > 1 else 'above and below'}"
    scale = max(bucket.height / info.height, bucket.width / info.width)
    if abs(scale - 1) >= 0.005:
        text += f"; {'enlarged' if scale > 1 else 'shrunk'} to {100 * scale:.0f}\u00a0%"
    return text
