"""The demo's judge is right on pictures whose captions are."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sat_ext.demo_data import write_demo
from sat_ext.demo_score import Seen, described, right_in, seen_in
from sat_ext.errors import DataError


def pixels(path: Path) -> np.ndarray:
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return np.asarray(Image.open(path).convert("RGB"))[None]


@pytest.mark.parametrize("part", ["videos", "stills"])
def test_held_out_originals_are_seen_as_captioned(tmp_path: Path, part: str) -> None:
    write_demo(tmp_path / "demo", clips=1, stills=1, held_out=48)
    folder = tmp_path / "demo/heldout"
    media = [path for path in sorted((folder / part).iterdir()) if path.suffix != ".txt"]
    captions = folder / ("labels" if part == "videos" else "stills")
    wrong = []
    for path in media:
        wanted = described((captions / f"{path.stem}.txt").read_text().strip())
        if (found := seen_in(pixels(path))) != wanted:
            wrong.append((path.name, found))
    assert len(media) == 48
    assert not wrong


def test_a_moved_square_is_seen() -> None:
    frame = np.full((64, 64, 3), 24, np.uint8)
    frame[10:30, 10:30] = (40, 90, 225)
    moved = np.roll(frame, 20, axis=0)
    found = seen_in(np.stack([frame, moved]))
    assert found == Seen(colour="blue", background="black", shape="square", direction="down")


def test_what_is_right_is_counted() -> None:
    still = np.full((1, 64, 64, 3), 24, np.uint8)
    still[:, 20:44, 20:44] = (40, 90, 225)
    captions = ("a blue square on black", "a red square on white")
    assert right_in([(caption, still) for caption in captions]) == {
        "samples": 2, "colour": 1, "background": 1, "shape": 2,
    }  # fmt: skip


def test_another_caption_is_refused() -> None:
    with pytest.raises(DataError, match=r"'a dog' is no caption of the demo's data \(sat-ext demo\)"):
        described("a dog")
