from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import pytest

from sat_ext.data.decode import DECODERS
from sat_ext.errors import ConfigError, MediaError
from tests.media import index_of, indices_of, pattern, read_frames, real_clip, remux, write_clip

PLACES = [0, 1, 7, 11, 12, 13, 30, 48, 49]


def has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401  # what it needs may be missing
    except (ImportError, OSError, RuntimeError):
        return False
    return True


READERS = ["pyav", "decord", *(["torchcodec"] if has_torchcodec() else [])]


def read(path: Path, times: list[float], decoder: str = "auto") -> list[int]:
    return indices_of(read_frames(str(path), times, decoder=decoder))


def close(a: np.ndarray, b: np.ndarray, limit: float = 6) -> bool:
    """Equal but for what lossy coding changes."""
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).mean()) < limit


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """50 frames at 25 fps, key frames at 0, 12, 24, 36 and 48."""
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", 50, 25)


@pytest.mark.parametrize("decoder", READERS)
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "ts", "avi", "flv", "mpg"])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_frames_are_picked_by_time_in_every_container(tmp_path, suffix, b_frames, decoder):
    codec = "mpeg2video" if suffix == "mpg" else "libx264"
    path = write_clip(tmp_path / f"a.{suffix}", 50, 25, codec=codec, b_frames=b_frames)
    assert read(path, [p / 25 for p in PLACES], decoder) == PLACES
    for place in (49, 25, 13, 12, 11):
        assert read(path, [place / 25], decoder) == [place]


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libsvtav1", "libx265", "mpeg4", "ffv1", "mjpeg"])
def test_other_codecs_are_read(tmp_path, codec):
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_clip(tmp_path / "a.mkv", 50, 25, codec=codec, pixel_format=pixel_format)
    assert read(path, [p / 25 for p in PLACES]) == PLACES
    assert read(path, [1.2]) == [30]


@pytest.mark.parametrize("decoder", READERS)
def test_times_may_repeat_and_come_in_any_order(clip, decoder):
    assert read(clip, [1.0, 0.04, 1.0, 0.0, 1.96, 0.04], decoder) == [25, 1, 25, 0, 49, 1]


@pytest.mark.parametrize("decoder", READERS)
def test_a_frame_is_shown_until_the_next_one_starts(clip, decoder):
    assert read(clip, [0.0389, 0.0391, 0.04, 0.0788, 0.0799], decoder) == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("decoder", READERS)
def test_the_last_frame_is_held_and_the_first_one_stands_for_what_is_before(clip, decoder):
    assert read(clip, [1.99, 2.0, 60.0], decoder) == [49, 49, 49]
    assert read(clip, [-0.5, 0.0], decoder) == [0, 0]


@pytest.mark.parametrize("decoder", READERS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_frame_rate_is_read_by_the_clock(tmp_path, suffix, decoder):
    starts = [0, 0.1, 0.35, 0.4, 0.9, 1.0, 1.05, 1.9]
    path = write_clip(tmp_path / f"a.{suffix}", len(starts), starts=starts, gop=3)
    times = [k / 10 for k in range(22)]
    expected = [max(i for i, s in enumerate(starts) if s <= t + 1e-3) for t in times]
    assert read(path, times, decoder) == expected
    for t, index in zip(times, expected, strict=True):
        assert read(path, [t], decoder) == [index]


@pytest.mark.parametrize("decoder", READERS)
def test_times_count_from_the_first_frame_wherever_the_file_starts(tmp_path, clip, decoder):
    for name, options in (("a.mp4", {}), ("b.mp4", {"use_editlist": "0"}), ("c.mkv", {}), ("d.ts", {})):
        path = remux(clip, tmp_path / name, shift=3.2, options=options)
        assert read(path, [p / 25 for p in PLACES], decoder) == PLACES
        assert read(path, [1.2], decoder) == [30]


@pytest.mark.parametrize("decoder", READERS)
def test_frames_that_an_edit_list_hides_are_not_shown(tmp_path, clip, decoder):
    path = remux(clip, tmp_path / "a.mp4", shift=-15 / 25, options={"avoid_negative_ts": "disabled"})
    assert read(path, [0, 1 / 25, 8 / 25, 9 / 25, 34 / 25], decoder) == [15, 16, 23, 24, 49]
    assert read(path, [0.0], decoder) == [15]


@pytest.mark.parametrize("decoder", READERS)
def test_fragmented_mp4_is_read(tmp_path, clip, decoder):
    path = remux(clip, tmp_path / "a.mp4", options={"movflags": "frag_keyframe+empty_moov"})
    assert read(path, [p / 25 for p in PLACES], decoder) == PLACES


@pytest.mark.parametrize("decoder", READERS)
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_every_decoder_reads_open_groups(tmp_path, codec, decoder):
    options = {f"{codec[3:]}-params": "open-gop=1:scenecut=0"}
    path = write_clip(tmp_path / "a.mp4", 50, 25, codec=codec, options=options)
    assert read(path, [p / 25 for p in range(50)], decoder) == list(range(50))
    assert read(path, [11 / 25, 23 / 25], decoder) == [11, 23]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frames_before_an_open_key_frame_are_read_from_the_one_before_it(tmp_path, suffix):
    path = write_clip(tmp_path / f"a.{suffix}", 50, 25, options={"x264-params": "open-gop=1:scenecut=0"})
    whole = read_frames(str(path), [p / 25 for p in range(50)])
    assert indices_of(whole) == list(range(50))
    for place in range(50):
        assert np.array_equal(read_frames(str(path), [place / 25])[0], whole[place]), place


def shifting_noise(path: Path, width: int, frames: int = 60, **params: int) -> Path:
    """A slow pan over large noise by x264, without any key frame but the first: columns are refreshed in turn."""
    big = np.random.default_rng(0).integers(0, 256, (12, 60, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    text = ":".join(f"{name.replace('_', '-')}={value}" for name, value in params.items())
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": f"intra-refresh=1:{text}"})
        stream.width, stream.height, stream.pix_fmt = width, 96, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(big[:, i : i + width]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("decoder", READERS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(("width", "keyint", "bframes"), [(64, 10, 0), (128, 10, 0), (128, 29, 0), (128, 10, 2)])
def test_intra_refresh_gives_the_true_frames(tmp_path, width, keyint, bframes, suffix, decoder):
    path = shifting_noise(tmp_path / f"a.{suffix}", width, keyint=keyint, bframes=bframes, scenecut=0)
    with av.open(str(path)) as container:
        truth = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for place in (*range(19, 60, 8), *range(50, 60)):
        assert np.array_equal(read_frames(str(path), [place / 25], decoder=decoder)[0], truth[place]), place


def test_a_stream_cut_between_key_frames_shows_its_first_whole_frame_first(tmp_path, clip):
    path = remux(clip, tmp_path / "a.ts", keep=lambda number: number >= 5)
    first, *others = read(path, [0, 1.0, 1.2])
    assert first == 12 and others[1] - others[0] == 5


@pytest.mark.parametrize("decoder", READERS)
def test_a_video_of_one_frame_is_read(tmp_path, decoder):
    for suffix in ("mp4", "mkv", "avi", "webm"):
        codec = "libvpx-vp9" if suffix == "webm" else "libx264"
        path = write_clip(tmp_path / f"a.{suffix}", 1, codec=codec)
        assert read(path, [0.0, 0.0, 5.0], decoder) == [0, 0, 0]


@pytest.mark.parametrize("decoder", READERS)
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("mirror", [False, True])
def test_frames_are_upright(tmp_path, rotation, mirror, decoder):
    path = write_clip(tmp_path / "a.mp4", 14, 25, rotation=rotation, mirror=mirror)
    frames = read_frames(str(path), [0, 13 / 25], decoder=decoder)
    for frame, place in zip(frames, (0, 13), strict=True):
        wanted = np.rot90(pattern(place), rotation // 90)  # the display matrix turns first, then mirrors
        assert close(frame, wanted[:, ::-1] if mirror else wanted)


def test_a_first_frame_is_had_without_the_rest_of_the_file(tmp_path, clip):
    """Noise in place of all that follows would raise."""
    path = remux(clip, tmp_path / "a.mp4", damage=range(8, 50))
    assert read(path, [0.0]) == [0]
    with pytest.raises(MediaError):
        read(path, [1.0])


def test_reading_starts_at_the_key_frame_before_and_ends_right_behind(tmp_path, clip):
    """Of the groups of 12 only the one that is wanted is whole."""
    path = remux(clip, tmp_path / "a.mp4", damage=[*range(0, 24), *range(40, 50)])
    assert read(path, [24 / 25, 30 / 25, 33 / 25]) == [24, 30, 33]
    for place in (3, 23, 45, 49):
        with pytest.raises(MediaError):
            read(path, [place / 25])


def damaged(path: Path, clip: Path, number: int, *, wholly: bool = False) -> Path:
    """Zeros for a packet, which stops FFmpeg, or three bytes changed in its middle, which FFmpeg conceals."""
    content = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        entry = container.streams.video[0].index_entries[number]
    if wholly:
        content[entry.pos : entry.pos + entry.size] = bytes(entry.size)
    for at in range(entry.pos + entry.size // 2, entry.pos + entry.size // 2 + 3):
        content[at] ^= 0 if wholly else 0xFF
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("number", range(12, 24))
def test_concealed_damage_is_not_passed_on_with_the_frames_that_copy_from_it(tmp_path, clip, number):
    """By number in decoding order: 12 is the key frame, 13 a P-frame shown behind two B-frames, and so on."""
    whole = read_frames(str(clip), [p / 25 for p in range(50)])
    path = damaged(tmp_path / "a.mp4", clip, number)
    good = 0
    for place in range(50):
        try:
            assert np.array_equal(read_frames(str(path), [place / 25])[0], whole[place]), place
            good += 1
        except MediaError as error:
            assert 11 < place < 24
            assert error.path == str(path) and "damaged" in error.reason
    assert good >= 50 - 12


@pytest.mark.parametrize("decoder", READERS)
def test_damage_that_stops_the_decoder_is_an_error(tmp_path, clip, decoder):
    path = damaged(tmp_path / "a.mp4", clip, 14, wholly=True)
    reason = "not a readable video: Invalid data" if decoder == "pyav" else f"cannot be decoded by {decoder}: "
    with pytest.raises(MediaError, match=rf"a\.mp4: {reason}"):
        read(path, [p / 25 for p in range(50)], decoder)


def test_a_file_without_its_end_is_not_filled_up_with_its_last_frame(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 50, 25, container_options={"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    assert read(path, [0.0]) == [0]
    with pytest.raises(MediaError, match=r"truncated|Invalid data|damaged"):
        read(path, [1.9])


@pytest.mark.parametrize("decoder", READERS)
def test_unreadable_files_say_why(tmp_path, decoder):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    for name, reason in (
        ("gone", "no such file"),
        ("empty", "the file is empty"),
        ("text", "not a readable video"),
    ):
        with pytest.raises(MediaError, match=rf"{name}\.mp4: {reason}"):
            read(tmp_path / f"{name}.mp4", [0.0], decoder)


def test_auto_is_pyav():
    assert DECODERS["auto"] is DECODERS["pyav"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"color": (1, 1)},
        {"color": (9, 1)},
        {"color": (5, 2)},
        {"pixel_format": "yuvj420p"},
        {"pixel_format": "yuv444p"},
        {"size": (98, 130)},
        {"options": {"x264-params": "weightp=2:ref=5:b-pyramid=2:bframes=5"}, "b_frames": 5},
    ],
    ids=str,
)
def test_decoders_agree_exactly(tmp_path, changes):
    path = write_clip(tmp_path / "a.mp4", 30, 25, **changes)
    times = [p / 8 for p in range(10)]
    pyav, *others = (read_frames(str(path), times, decoder=d) for d in READERS)
    assert others and all(np.array_equal(pyav, other) for other in others)


@pytest.mark.parametrize(("codec", "suffix"), [("libx265", "mp4"), ("libvpx-vp9", "webm")])
def test_decoders_agree_exactly_on_other_codecs(tmp_path, codec, suffix):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_clip(tmp_path / f"a.{suffix}", 30, 25, codec=codec, options=options)
    pyav, *others = (read_frames(str(path), [p / 8 for p in range(10)], decoder=d) for d in READERS)
    assert others and all(np.array_equal(pyav, other) for other in others)


def test_a_decoder_that_is_not_installed_says_what_to_do(clip, monkeypatch):
    for name, remedy in (
        ("decord", "decoder: decord is not installed; pip install decord, or write pyav"),
        ("torchcodec", r"decoder: torchcodec cannot be imported \(.*\); install one that fits this torch, and "
         "FFmpeg's shared libraries, or write pyav"),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=remedy):
            read_frames(str(clip), [0.0], decoder=name)


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_decoders_agree_exactly_on_real_clips(name):
    path = str(real_clip(name))
    times = [0.0, 0.03, 0.04, 1.5, 1.625, 1.75, 2.9, 3.1]
    pyav, *others = (read_frames(path, times, decoder=d) for d in READERS)
    assert others and all(np.array_equal(pyav, other) for other in others)
    with av.open(path) as container:
        frames = [
            (f.time, av.VideoFrame.from_ndarray(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)
        ]
        ratio = container.streams.video[0].sample_aspect_ratio or 1  # carphone's pixels are not square
    wide = {"width": round(frames[0][1].width * ratio), "interpolation": "BICUBIC"} if ratio != 1 else {}
    straight = [(start, f.to_ndarray(format="rgb24", **wide)) for start, f in frames]
    for t, frame in zip(times, pyav, strict=True):
        assert np.array_equal(frame, [pixels for start, pixels in straight if start <= t + 1e-3][-1])


def test_frames_are_ours_to_write_and_contiguous(clip):
    frames = read_frames(str(clip), [0.0, 0.5])
    assert frames.dtype == np.uint8 and frames.shape == (2, 96, 128, 3)
    assert frames.flags.writeable and frames.flags.c_contiguous


def test_a_video_that_changes_size_is_refused(tmp_path):
    small = write_clip(tmp_path / "a.ts", 10, 10)
    large = write_clip(tmp_path / "b.ts", 10, 10, size=(144, 192))
    path = tmp_path / "c.ts"
    path.write_bytes(small.read_bytes() + remux(large, tmp_path / "d.ts", shift=1).read_bytes())
    assert index_of(read_frames(str(path), [0.5])[0]) == 5
    with pytest.raises(MediaError, match="its frames change size, from 128x96"):
        read_frames(str(path), [0.5, 1.5])


def test_frames_over_the_pixel_limit_are_refused(clip, monkeypatch):
    monkeypatch.setattr("sat_ext.media.MAX_PIXELS", 128 * 96 - 1)
    with pytest.raises(MediaError, match="128x96 pixels, over the limit of 12287"):
        read(clip, [0.0])
