"""Generated samples as a picture and as a clip, beside their captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from textwrap import fill

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sat_ext.media import write_video

CAPTION_WIDTH, CAPTION_LETTERS = 220, 30  # pixels, and the letters that fit into them
HEADER, MARGIN = 24, 6
STRIP_FRAMES = 5  # of a clip, evenly spread from the first to the last
CELL = 96  # pixels a side of one frame, at least; small frames are enlarged by whole numbers


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One line of the sheet. `strips` maps a title to frames, uint8 (T, H, W, 3)."""

    caption: str
    strips: dict[str, np.ndarray]


def write_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """A PNG with a line per row: the caption, then each strip of frames under its title, the same in all rows."""
    font = ImageFont.load_default(size=13)
    titles = list(rows[0].strips)
    shown = [[_side_by_side(row.strips[title]) for title in titles] for row in rows]
    widths = [max(strip.width for strip in column) + 2 * MARGIN for column in zip(*shown)]
    heights = [max(strip.height for strip in line) + 2 * MARGIN for line in shown]
    lefts = list(accumulate(widths, initial=CAPTION_WIDTH + MARGIN))
    sheet = Image.new("RGB", (CAPTION_WIDTH + sum(widths), HEADER + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for left, title in zip(lefts, titles):
        draw.text((left, 5), title, fill="black", font=font)
    for row, strips, top in zip(rows, shown, accumulate(heights, initial=HEADER)):
        draw.line((0, top, sheet.width, top), fill=(220, 220, 220))
        draw.multiline_text((MARGIN, top + MARGIN), fill(row.caption, CAPTION_LETTERS), fill="black", font=font)
        for left, strip in zip(lefts, strips):
            sheet.paste(strip, (left, top + MARGIN))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def write_clip(rows: Sequence[SheetRow], path: Path, fps: int, columns: int = 4) -> None:
    """An H.264 MP4 that plays the rows' clips side by side, each with its strips one below the other.

    Rows need strips of one shape; stills among them are left out."""
    moving = [row for row in rows if len(next(iter(row.strips.values()))) > 1]
    tiles = [np.concatenate([_enlarged(s) for s in row.strips.values()], axis=1) for row in moving]
    while len(tiles) % columns:
        tiles.append(np.full_like(tiles[0], 255))
    lines = [np.concatenate(tiles[i : i + columns], axis=2) for i in range(0, len(tiles), columns)]
    frames = np.concatenate(lines, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, list(frames), fps, crf=12)


def _side_by_side(frames: np.ndarray) -> Image.Image:
    if len(frames) > STRIP_FRAMES:
        frames = frames[np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)]
    # a white line between frames, or their backgrounds would run into each other
    gap = np.full_like(_enlarged(frames)[0][:, :2], 255)
    return Image.fromarray(np.concatenate([part for f in _enlarged(frames) for part in (f, gap)], axis=1))


def _enlarged(frames: np.ndarray) -> np.ndarray:
    factor = max(1, round(CELL / max(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
