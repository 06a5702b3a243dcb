"""Parts of files: pure arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from sat_ext.data.parts import file_times, part_info
from sat_ext.errors import MediaError
from sat_ext.types import TIME_TOLERANCE, Item, MediaInfo

CLIP = MediaInfo(width=1280, height=720, frames=300, fps=30.0, duration=10.0, codec="h264")
STILL = MediaInfo(width=640, height=480, frames=1, fps=0.0, duration=0.0, codec="jpeg")


def item(**changes: Any) -> Item:
    return Item(path="a.mp4", key="a.mp4", captions=("",), **changes)


def test_an_item_that_names_no_part_is_the_whole_file() -> None:
    assert part_info(item(), CLIP) is CLIP
    assert part_info(item(end=60.0), CLIP) == CLIP  # an end behind the file's is the file's
    assert file_times(item(), CLIP, (0.0, 0.125, 9.99)) == (0.0, 0.125, 9.99)


@pytest.mark.parametrize(
    ("changes", "frames", "fps", "duration"),
    [
        ({"start": 2.0}, 240, 30.0, 8.0),
        ({"end": 2.0}, 60, 30.0, 2.0),
        ({"start": 2.0, "end": 4.5}, 75, 30.0, 2.5),
        ({"fps": 15.0}, 300, 15.0, 20.0),  # played at half speed
        ({"start": 5.0, "fps": 60.0}, 150, 60.0, 2.5),
        ({"start": 2.0, "end": 2.01}, 1, 0.0, 0.0),  # less than a frame is an image
        ({"start": 2.0, "end": 2.0}, 1, 0.0, 0.0),
    ],
)
def test_length_and_rate_of_a_part(changes: dict[str, float], frames: int, fps: float, duration: float) -> None:
    part = part_info(item(**changes), CLIP)
    assert (part.frames, part.fps, part.duration) == (frames, fps, pytest.approx(duration))
    assert (part.width, part.height, part.codec) == (1280, 720, "h264")


def test_a_crop_is_the_size_of_the_part() -> None:
    part = part_info(item(crop=(100, 20, 640, 700)), CLIP)
    assert (part.width, part.height, part.frames) == (640, 700, 300)
    part = part_info(item(crop=(0, 0, 1, 1)), STILL)
    assert (part.width, part.height, part.frames) == (1, 1, 1)


def test_a_still_has_no_times() -> None:
    assert part_info(item(start=1.0, end=2.0, fps=8.0), STILL) == STILL


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"start": 10.0}, r"its part from 10 s to its end is outside its 10\.000 s; fix start and end"),
        ({"start": -1.0}, r"its part from -1 s to its end is outside"),
        ({"start": 3.0, "end": 2.0}, r"its part from 3 s to 2 s is outside its 10\.000 s"),
        ({"crop": (1, 0, 1280, 720)}, r"its crop \[1, 0, 1280, 720\] \(left, top, width, height\) is outside its"),
        ({"crop": (0, 0, 0, 720)}, r".* is outside its 1280x720 pixels; fix the crop"),
        ({"crop": (-1, 0, 10, 10)}, r".* is outside its 1280x720 pixels; fix the crop"),
    ],
)
def test_a_part_outside_its_file_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(MediaError, match=rf"^a\.mp4: {reason}"):
        part_info(item(**changes), CLIP)


def test_times_of_a_part_are_the_files_from_its_start_on() -> None:
    assert file_times(item(start=2.0), CLIP, (0.0, 0.5)) == (2.0, 2.5)
    assert file_times(item(start=2.0, fps=15.0), CLIP, (0.0, 1.0)) == (2.0, 2.5)  # slower: half the way


def test_times_stay_before_the_end_of_the_part() -> None:
    """A decoder shows the last frame that starts at or before t + TIME_TOLERANCE: not the one at the end."""
    times = file_times(item(start=2.0, end=3.0), CLIP, (0.9, 1.0, 1.5))
    assert times[0] == 2.9
    assert all(t + TIME_TOLERANCE < 3.0 for t in times)
    assert file_times(item(start=2.0, end=2.0), CLIP, (0.0,)) == (2.0,)


def test_times_never_leave_the_file() -> None:
    assert file_times(item(start=9.0), CLIP, (0.5, 4.0)) == (9.5, 10.0)
