from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sat_ext.data.probe import probe
from sat_ext.errors import MediaError
from tests.media import pattern, real_clip, remux, write_clip

VFR_STARTS = [0, 0.1, 0.35, 0.4, 0.9, 1.0, 1.05, 1.9]


def still(path: Path, size: tuple[int, int] = (64, 48), orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (200, 30, 30)).save(path, exif=exif)
    return path


def facts(path: Path) -> tuple[int, int, int]:
    info = probe(str(path))
    return info.width, info.height, info.frames


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "avi", "flv", "mpg"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_every_container_gives_size_count_rate_and_duration(tmp_path, suffix, b_frames):
    codec = "mpeg2video" if suffix == "mpg" else "libx264"
    path = write_clip(tmp_path / f"a.{suffix}", 50, 25, codec=codec, b_frames=b_frames)
    info = probe(str(path))
    assert (info.width, info.height, info.frames, info.kind) == (128, 96, 50, "video")
    assert info.fps == pytest.approx(25, rel=1e-3) and info.duration == pytest.approx(2, abs=2e-3)


def test_the_codec_is_named(tmp_path):
    assert probe(str(write_clip(tmp_path / "a.mp4", 3))).codec == "h264"
    assert probe(str(write_clip(tmp_path / "a.webm", 3, codec="libvpx-vp9"))).codec == "vp9"
    assert probe(str(still(tmp_path / "a.png"))).codec == "png"


def test_a_video_of_one_frame_is_an_image(tmp_path):
    for suffix in ("mp4", "mkv", "avi"):
        info = probe(str(write_clip(tmp_path / f"a.{suffix}", 1)))
        assert (info.frames, info.fps, info.duration, info.kind) == (1, 0.0, 0.0, "image")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_rate_gives_the_mean_rate_and_the_true_duration(tmp_path, suffix):
    starts = VFR_STARTS
    info = probe(str(write_clip(tmp_path / f"a.{suffix}", len(starts), starts=starts)))
    assert info.frames == len(starts)
    assert 1.9 < info.duration < 1.9 + 1  # how long the last frame lasts is the muxer's guess
    assert info.fps == pytest.approx(info.frames / info.duration)


def overwrite(path: Path, mark: bytes, skip: int, value: bytes) -> Path:
    """Other bytes, some way behind each place where `mark` is in the file."""
    content = bytearray(path.read_bytes())
    at = content.find(mark)
    assert at >= 0
    while at >= 0:
        content[at + skip : at + skip + len(value)] = value
        at = content.find(mark, at + 1)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("seconds", [0, 1, 2.9, 60, None])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_an_mp4_lasts_as_long_as_its_frames_whatever_its_headers_say(tmp_path, seconds, b_frames):
    """The media header (mdhd) and the movie header (mvhd) have a duration, which players do not go by."""
    path = write_clip(tmp_path / "a.mp4", 90, 30, b_frames=b_frames)
    with av.open(str(path)) as container:
        ticks = container.streams.video[0].time_base.denominator
    for box, scale in ((b"mdhd", ticks), (b"mvhd", 1000)):
        value = 0xFFFFFFFF if seconds is None else round(seconds * scale)
        overwrite(path, box, 20, value.to_bytes(4, "big"))
    info = probe(str(path))
    assert (info.frames, info.fps, info.duration) == (90, pytest.approx(30), pytest.approx(3))


@pytest.mark.parametrize("seconds", [0, 1, None])
def test_a_variable_rate_is_measured_from_the_frames_too(tmp_path, seconds):
    path = write_clip(tmp_path / "a.mp4", len(VFR_STARTS), starts=VFR_STARTS)
    value = 0xFFFFFFFF if seconds is None else seconds * 12800
    info = probe(str(overwrite(path, b"mdhd", 20, value.to_bytes(4, "big"))))
    assert info.frames == len(VFR_STARTS) and 1.9 < info.duration < 1.9 + 1


@pytest.mark.parametrize(
    ("suffix", "mark", "skip", "value"),
    [
        ("mkv", b"\x44\x89\x88", 3, struct.pack(">d", 1.0)),  # duration of the segment
        ("mkv", b"\x44\x89\x88", 3, struct.pack(">d", 9e9)),
        ("mkv", b"\x23\xe3\x83", 4, (10**7).to_bytes(3, "big")),  # default duration of a frame: now 2.6 s
        ("flv", b"\x00\x08duration\x00", 11, struct.pack(">d", 1.0)),
        ("flv", b"\x00\x09framerate\x00", 12, struct.pack(">d", 90.0)),
        ("avi", b"avih", 8, (11111).to_bytes(4, "little")),  # microseconds a frame
        ("avi", b"avih", 24, (7).to_bytes(4, "little")),  # number of frames
    ],
)
def test_other_headers_that_say_another_length_are_not_gone_by_either(tmp_path, suffix, mark, skip, value):
    path = overwrite(write_clip(tmp_path / f"a.{suffix}", 90, 30), mark, skip, value)
    info = probe(str(path))
    assert (info.frames, info.duration) == (90, pytest.approx(3, abs=0.02))


def test_ntsc_rates_are_exact():
    info = probe(str(real_clip("carphone_pristine.mp4")))
    assert info.frames == 120 and Fraction(info.fps).limit_denominator(2000) == Fraction(30000, 1001)
    assert info.duration == pytest.approx(120 * 1001 / 30000)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    source = write_clip(tmp_path / "a.mp4", 24, 8, gop=12)
    options = {"avoid_negative_ts": "disabled"}
    trimmed = probe(str(remux(source, tmp_path / "b.mp4", shift=-5 / 8, options=options)))
    assert (trimmed.frames, trimmed.duration, trimmed.fps) == (19, 19 / 8, 8.0)
    delayed = probe(str(remux(source, tmp_path / "c.mp4", shift=3)))
    assert (delayed.frames, delayed.duration, delayed.fps) == (24, 3.0, 8.0)


def test_a_fragmented_mp4_is_counted_whole(tmp_path):
    source = write_clip(tmp_path / "a.mp4", 24, 8, gop=6)
    path = remux(source, tmp_path / "b.mp4", options={"movflags": "frag_keyframe+empty_moov"})
    info = probe(str(path))
    assert (info.frames, info.duration) == (24, 3.0)


@pytest.mark.parametrize(
    ("rotation", "size"), [(0, (128, 96)), (90, (96, 128)), (180, (128, 96)), (-90, (96, 128))]
)
def test_width_and_height_are_as_displayed(tmp_path, rotation, size):
    assert facts(write_clip(tmp_path / "a.mp4", 3, rotation=rotation))[:2] == size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_stills_have_their_size_after_exif_rotation(tmp_path, suffix, orientation):
    path = still(tmp_path / f"a.{suffix}", (64, 48), orientation)
    assert facts(path) == ((48, 64, 1) if orientation >= 5 else (64, 48, 1))


def test_a_still_is_probed_from_its_header(tmp_path):
    path = still(tmp_path / "a.png", (640, 480))
    path.write_bytes(path.read_bytes()[:200])
    assert facts(path) == (640, 480, 1)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_is_a_clip_and_a_single_picture_is_not(tmp_path, suffix):
    frames = [Image.fromarray(pattern(i)) for i in range(6)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 100, 300, 100, 100, 100])
    info = probe(str(path))
    assert (info.width, info.height, info.frames, info.kind) == (128, 96, 6, "video")
    assert info.duration == pytest.approx(0.8) and info.fps == pytest.approx(7.5)
    frames[0].save(path)
    assert facts(path) == (128, 96, 1)


def test_pages_of_a_tiff_are_not_an_animation(tmp_path):
    pages = [Image.new("RGB", (32, 32))] * 3
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    assert facts(tmp_path / "a.tiff") == (32, 32, 1)


def with_cover(path: Path, *, video: bool) -> Path:
    """Sound with cover art, and a video stream beside it or not."""
    with av.open(str(path), "w") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 48, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        clip = out.add_stream("libx264", rate=8) if video else None
        sound = out.add_stream("aac", rate=8000)
        if clip:
            clip.width, clip.height, clip.pix_fmt = 128, 96, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 48, 3), np.uint8), format="rgb24")
        out.mux(cover.encode(picture.reformat(format="yuvj420p")) + cover.encode(None))
        for i in range(8 if clip else 0):
            out.mux(clip.encode(av.VideoFrame.from_ndarray(pattern(i), format="rgb24")))
        out.mux(clip.encode(None) if clip else [])
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        out.mux(sound.encode(silence) + sound.encode(None))
    return path


def test_cover_art_is_not_the_video(tmp_path):
    assert facts(with_cover(tmp_path / "a.mp4", video=True)) == (128, 96, 8)
    with pytest.raises(MediaError, match=r"a\.mp4: no video stream"):
        probe(str(with_cover(tmp_path / "a.mp4", video=False)))


def test_broken_files_say_what_is_wrong(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", 24, options={"crf": "1"}).read_bytes()
    fast = write_clip(tmp_path / "b.mp4", 24, container_options={"movflags": "faststart"}).read_bytes()
    for name, content, reason in [
        ("empty.mp4", b"", r"the file is empty \(0 bytes\)"),
        ("empty.png", b"", r"the file is empty \(0 bytes\)"),
        ("text.mp4", b"This is not a video.\n" * 50, "not a readable video: Invalid data"),
        ("text.jpg", b"This is not an image.\n" * 50, "not a readable image: unknown format"),
        ("no_index.mp4", clip[: len(clip) // 2], "not a readable video: Invalid data"),
        ("no_end.mp4", fast[:-2000], r"truncated: its index reaches to byte \d+ of \d+"),
        ("cut.gif", b"GIF89a\x10\x00", "not a readable image"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=reason) as error:
            probe(str(tmp_path / name))
        assert error.value.path == str(tmp_path / name) and str(tmp_path) not in error.value.reason
    with pytest.raises(MediaError, match=r"gone\.mp4: no such file"):
        probe(str(tmp_path / "gone.mp4"))
    with pytest.raises(MediaError, match="no such file"):
        probe(str(tmp_path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(tmp_path):
    for name, size in (("a.png", (12_000, 12_000)), ("b.png", (20_000, 20_000))):
        Image.new("1", size).save(tmp_path / name)
        with pytest.raises(MediaError, match="limit"):
            probe(str(tmp_path / name))


def test_odd_names_are_no_protocols_and_no_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "größe 猫.mp4", "%03d.mp4", "a b#1?.mp4"):
        write_clip(tmp_path / "source.mp4", 3).rename(tmp_path / name)
        assert probe(name).frames == 3


def test_metadata_that_is_not_utf8_does_no_harm(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 3, metadata={"title": "titel"})
    content = path.read_bytes()
    assert b"titel" in content
    path.write_bytes(content.replace(b"titel", b"t\xefte\xff"))
    assert probe(str(path)).frames == 3
