"""The part of a file that an item names (start, end, crop, rate), described as a file itself. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from sat_ext.errors import MediaError
from sat_ext.types import TIME_TOLERANCE, Item, MediaInfo


def part_info(item: Item, info: MediaInfo) -> MediaInfo:
    """What the item's part of a file holds; `info` describes the whole file.

    `start` and `end` are in the file's own seconds, the result's `duration` at `item.fps`, if given. Raises
    `MediaError` for a part outside the file.

    >>> whole = MediaInfo(width=1280, height=720, frames=300, fps=30.0, duration=10.0, codec="h264")
    >>> item = Item(path="a.mp4", key="a", captions=("",), start=2.0, end=4.0, crop=(280, 0, 720, 720), fps=60.0)
    >>> part_info(item, whole)
    MediaInfo(width=720, height=720, frames=60, fps=60.0, duration=1.0, codec='h264')
    """
    if item.crop is not None:
        left, top, width, height = item.crop
        if min(left, top) < 0 or min(width, height) < 1 or left + width > info.width or top + height > info.height:
            size = f"{info.width}x{info.height} pixels"
            crop = f"its crop {list(item.crop)} (left, top, width, height)"
            raise MediaError(item.path, f"{crop} is outside its {size}; fix the crop")
        info = replace(info, width=width, height=height)
    if info.frames == 1:
        return info
    end = info.duration if item.end is None else min(item.end, info.duration)
    if item.start < 0 or item.start >= info.duration or end < item.start:
        until = "its end" if item.end is None else f"{item.end:g} s"
        part = f"its part from {item.start:g} s to {until}"
        raise MediaError(item.path, f"{part} is outside its {info.duration:.3f} s; fix start and end")
    if (item.start, end) != (0.0, info.duration):
        frames = max(1, round((end - item.start) * info.frames / info.duration))
        info = replace(info, frames=frames, duration=end - item.start)
    if info.frames == 1:
        return replace(info, fps=0.0, duration=0.0)
    if item.fps is not None:
        info = replace(info, fps=item.fps, duration=info.frames / item.fps)
    return info


def file_times(item: Item, info: MediaInfo, times: Sequence[float]) -> tuple[float, ...]:
    """Times in the item's part as times in its file; `info` describes the whole file."""
    speed = item.fps * info.duration / info.frames if item.fps is not None and info.duration else 1.0
    # A decoder shows the last frame that starts at or before t + `TIME_TOLERANCE`: not the one after the part.
    latest = info.duration if item.end is None else max(item.start, item.end - 2 * TIME_TOLERANCE)
    return tuple(round(min(item.start + t * speed, latest), 9) for t in times)
