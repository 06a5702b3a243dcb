from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sat_ext.demo_data import BACKGROUNDS, COLOURS, FRAME_RATES, write_demo
from sat_ext.errors import DataError

CAPTION = re.compile(
    r"(?:a|an) (?P<colour>\w+) (?P<shape>circle|square|triangle)(?: moving (?P<motion>.+))?"
    r" on (?P<background>black|white)"
)
MOTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
FILLED = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5}  # of the smallest box around the shape


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new"
    write_demo(folder)
    return folder


@cache
def decoded(path: Path) -> tuple[np.ndarray, int]:
    """Every frame, RGB uint8 (T, H, W, 3), and the frame rate."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
        assert stream.average_rate is not None
        return frames, int(stream.average_rate)


def pixels(path: Path) -> np.ndarray:
    if path.suffix == ".mp4":
        return decoded(path)[0]
    return np.asarray(Image.open(path).convert("RGB"))[None]


def media(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix != ".txt")


def clip_caption(path: Path) -> str:
    return (path.parent.parent / "labels" / f"{path.stem}.txt").read_text(encoding="utf-8").strip()


def parts_of(caption: str) -> dict[str, str]:
    match = CAPTION.fullmatch(caption)
    assert match, caption
    return match.groupdict()


def centre_square(frame: np.ndarray) -> np.ndarray:
    side = min(frame.shape[:2])
    top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
    return frame[top : top + side, left : left + side].astype(int)


def shape_mask(frame: np.ndarray, background: str) -> np.ndarray:
    return np.abs(frame.astype(int) - BACKGROUNDS[background]).max(axis=-1) > 70


def centre(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the shape, in parts of the picture's short side."""
    return np.argwhere(mask).mean(axis=0)[::-1] / min(mask.shape)


def assert_shows(frame: np.ndarray, said: dict[str, str]) -> None:
    """The whole shape is in the centre square, and colour, form and background are what the caption says."""
    mask = shape_mask(centre_square(frame), said["background"])
    assert mask.sum() == shape_mask(frame, said["background"]).sum()
    colour = np.median(centre_square(frame)[mask], axis=0)
    assert min(COLOURS, key=lambda c: np.abs(colour - COLOURS[c]).sum()) == said["colour"]
    rows, columns = np.where(mask.any(axis=1))[0], np.where(mask.any(axis=0))[0]
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    filled = mask.sum() / (height * width)
    assert min(FILLED, key=lambda s: abs(filled - FILLED[s])) == said["shape"]
    assert 0.45 < width / mask.shape[1] < 0.65


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_clips_show_what_their_captions_say(demo, part):
    for path in media(demo / part / "videos"):
        said = parts_of(clip_caption(path))
        frames, fps = decoded(path)
        for frame in frames[:: max(1, len(frames) // 5)]:
            assert_shows(frame, said)
        first, last = (centre(shape_mask(frames[i], said["background"])) for i in (0, -1))
        speed = (last - first) / ((len(frames) - 1) / fps)
        along, across = np.dot(speed, MOTIONS[said["motion"]]), np.abs(speed[::-1] * MOTIONS[said["motion"]])
        assert 0.19 < along < 0.42, path  # of the picture in the second that 9 frames at 8 fps last
        assert across.max() < 0.02


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_stills_show_what_their_captions_say(demo, part):
    for path in media(demo / part / "stills"):
        said = parts_of(path.with_suffix(".txt").read_text(encoding="utf-8").strip())
        assert said["motion"] is None
        (frame,) = pixels(path)
        assert_shows(frame, said)


def test_the_clips_are_as_mixed_as_a_users(demo):
    clips = [decoded(p) for p in media(demo / "train" / "videos")]
    lengths = [len(frames) for frames, _ in clips]
    assert len(clips) == 48
    assert {fps for _, fps in clips} == set(FRAME_RATES)
    assert len({frames.shape[1:3] for frames, _ in clips}) >= 5
    assert max(lengths) <= 60
    assert sum(n < 9 for n in lengths) == 6
    assert all((n - 1) / fps >= 1.0 - 1e-9 for n, (_, fps) in zip(lengths, clips) if n >= 9)


def test_the_stills_come_in_every_format_and_some_are_videos_of_one_frame(demo):
    stills = media(demo / "train" / "stills")
    kinds = {s: [p for p in stills if p.suffix == s] for s in (".jpg", ".png", ".webp", ".mp4")}
    assert len(stills) == sum(map(len, kinds.values())) == 48
    assert all(len(paths) >= 4 for paths in kinds.values())
    assert [decoded(p)[0].shape[0] for p in kinds[".mp4"]] == [1] * 6
    for suffix, name in ((".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP")):
        assert {Image.open(p).format for p in kinds[suffix]} == {name}


def test_every_word_of_the_captions_is_seen_equally_often(demo):
    captions = [parts_of(clip_caption(p)) for p in media(demo / "train" / "videos")]
    for attribute, values in (("colour", 6), ("shape", 3), ("motion", 4), ("background", 2)):
        seen = [c[attribute] for c in captions]
        assert {seen.count(v) for v in seen} == {48 // values}


def test_held_out_files_are_other_pictures_and_their_clips_are_long_enough(demo):
    held_out = media(demo / "heldout" / "videos")
    assert len(held_out) == len(media(demo / "heldout" / "stills")) == 16
    assert all(len(decoded(p)[0]) >= 9 for p in held_out)
    for kind in ("videos", "stills"):
        train = {pixels(p)[0].tobytes() for p in media(demo / "train" / kind)}
        assert not train & {pixels(p)[0].tobytes() for p in media(demo / "heldout" / kind)}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.suffix == ".txt" else pixels(p).tobytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_seed_decides_every_pixel_and_caption(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_demo(tmp_path / name, clips=8, stills=8, held_out=1, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


def test_progress_counts_every_file(tmp_path: Path):
    seen = []
    write_demo(tmp_path, clips=3, stills=2, held_out=2, progress=lambda files: seen.extend(files) or files)
    assert len(seen) == 3 + 2 + 2 * 2
    assert all(path.exists() for path, _ in seen)
    readme = (tmp_path / "README.txt").read_text(encoding="utf-8")
    assert "3 H.264 clips" in readme and "2 stills" in readme


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(DataError) as error:
        write_demo(tmp_path)
    assert str(error.value) == (f"{tmp_path}: something is there already; name a folder that is new or empty.")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match="mine.txt: something is there already"):
        write_demo(tmp_path / "mine.txt")
