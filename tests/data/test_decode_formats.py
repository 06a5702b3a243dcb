"""Every kind of clip that the README names: probed and read alike, whole and by time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from sat_ext.data.probe import probe
from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError
from tests.media import indices_of, pattern, read_frames, real_clip, remux, write_clip

FRAMES, FPS = 30, 25

# codec, pixel format, containers, name in FFmpeg's readers
CODECS = [
    ("libx264", "yuv420p", ("mp4", "mkv", "mov", "avi"), "h264"),
    ("libx264", "yuv420p10le", ("mp4",), "h264"),
    ("libx264", "yuv444p", ("mkv",), "h264"),
    ("libx265", "yuv420p", ("mp4", "mkv", "mov"), "hevc"),
    ("libx265", "yuv420p10le", ("mp4",), "hevc"),
    ("libvpx-vp9", "yuv420p", ("webm", "mkv", "mp4"), "vp9"),
    ("libsvtav1", "yuv420p", ("webm", "mkv", "mp4"), "av1"),
    ("libsvtav1", "yuv420p10le", ("mp4",), "av1"),
    ("prores_ks", "yuv422p10le", ("mov", "mkv"), "prores"),
    ("ffv1", "yuv420p", ("mkv", "avi"), "ffv1"),
    ("mpeg4", "yuv420p", ("mp4", "avi", "mkv"), "mpeg4"),
    ("mjpeg", "yuvj420p", ("mov", "avi"), "mjpeg"),
    ("libx264", "yuv420p", ("3gp", "3g2", "f4v"), "h264"),
    ("libvpx", "yuv420p", ("ogv",), "vp8"),
    ("mpeg2video", "yuv420p", ("mxf", "nut"), "mpeg2video"),
    ("apng", "rgb24", ("apng",), "apng"),
]
CASES = [(codec, pixels, suffix, name) for codec, pixels, suffixes, name in CODECS for suffix in suffixes]


def make(path: Path, codec: str, pixel_format: str, **changes) -> Path:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    return write_clip(path, FRAMES, FPS, codec=codec, pixel_format=pixel_format, options=options, **changes)


@pytest.mark.parametrize(("codec", "pixel_format", "suffix", "name"), CASES)
def test_every_codec_and_container_is_probed_and_read(tmp_path, codec, pixel_format, suffix, name):
    path = make(tmp_path / f"a.{suffix}", codec, pixel_format)
    info = probe(str(path))
    assert (info.width, info.height, info.frames, info.kind) == (128, 96, FRAMES, "video")
    assert info.fps == pytest.approx(FPS, rel=1e-2) and name in info.codec
    places = [0, 7, 8, 29, 13]
    frames = read_frames(str(path), [p / FPS for p in places])
    assert frames.shape == (5, 96, 128, 3) and indices_of(frames) == places
    assert indices_of(read_frames(str(path), [20 / FPS])) == [20]


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1", "ffv1", "mpeg4"])
def test_odd_sizes_keep_their_last_row_and_column(tmp_path, codec):
    pixel_format = "yuv444p" if codec in ("libx264", "libx265", "ffv1") else "yuv420p"
    path = make(tmp_path / "a.mkv", codec, pixel_format, size=(99, 131))
    info = probe(str(path))
    assert (info.width, info.height) == (131, 99)
    frames = read_frames(str(path), [0.0, 0.4])
    assert frames.shape == (2, 99, 131, 3) and indices_of(frames) == [0, 10]
    assert read_frames(str(path), [0.4], fit=Fit(32, 48)).shape == (1, 3, 32, 48)


def two_streams(path: Path, *streams: tuple[str, int, tuple[int, int], int]) -> str:
    """Streams of (codec, number of frames, size, disposition); frame i of stream n is `pattern(100 * n + i)`."""
    with av.open(str(path), "w") as container:
        made = []
        for codec, _, size, flags in streams:
            stream = container.add_stream(codec, rate=FPS)
            stream.height, stream.width = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = Disposition(flags)
            made.append(stream)
        for i in range(max(count for _, count, _, _ in streams)):
            for n, (stream, (_, count, size, _)) in enumerate(zip(made, streams)):
                if i < count:
                    frame = av.VideoFrame.from_ndarray(pattern(100 * n + i, *size), format="rgb24")
                    container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode(None))
    return str(path)


def interlaced(path: Path, codec: str, options: dict[str, str], *, field_order: int = 0) -> str:
    """12 frames of a white bar that moves between their even and odd rows, 6 pixels a field."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 160, 96
        stream.pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        stream.codec_context.thread_count = 1
        if field_order:
            stream.codec_context.field_order = field_order
        for i in range(12):
            picture = np.zeros((96, 160, 3), np.uint8)
            picture[::2, 12 * i + 4 : 12 * i + 20] = 255
            picture[1::2, 12 * i + 10 : 12 * i + 26] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("codec", "suffix", "options", "field_order"),
    [
        ("libx264", "mp4", {"x264-params": "tff=1"}, 0),
        ("libx264", "mkv", {"x264-params": "bff=1"}, 0),
        ("libx264", "ts", {"x264-params": "tff=1"}, 0),
        ("mpeg2video", "mpg", {"flags": "+ildct+ilme"}, 0),
        ("prores_ks", "mov", {"flags": "+ildct"}, 0),
        ("ffv1", "mkv", {}, 2),
    ],
)
def test_interlaced_clips_have_no_combs(tmp_path, codec, suffix, options, field_order, decoder):
    if field_order and not hasattr(av.VideoCodecContext, "field_order"):
        pytest.skip("this PyAV does not say a container's field order")
    path = interlaced(tmp_path / f"a.{suffix}", codec, options, field_order=field_order)
    assert probe(path).frames == 12
    for frame, place in zip(read_frames(path, [0.0, 5 / 25], decoder=decoder).astype(int), (0, 5)):
        assert frame.shape == (96, 160, 3)
        assert np.abs(np.diff(frame[8:-8], axis=0)).max() < 60  # 255 where rows are of two moments
        assert frame[40, 12 * place + 12].min() > 200 and frame[40, 12 * place + 40].max() < 60


def test_progressive_frames_in_an_interlaced_format_keep_their_rows(tmp_path):
    path = interlaced(tmp_path / "a.mp4", "libx264", {"x264-params": "fake-interlaced=1", "crf": "5"})
    assert np.abs(np.diff(read_frames(path, [0.0])[0].astype(int), axis=0)).max() > 200


DEFAULT, IMPAIRED = int(Disposition.default), int(Disposition.visual_impaired)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
@pytest.mark.parametrize(
    ("streams", "wanted"),
    [
        ([("libx264", 30, (48, 64), 0), ("libx264", 30, (96, 128), DEFAULT)], 1),  # a proxy before it
        ([("libx264", 30, (96, 128), DEFAULT), ("libx264", 30, (192, 256), 0)], 0),
        ([("mjpeg", 2, (48, 64), 0), ("libx264", 30, (96, 128), DEFAULT)], 1),  # a thumbnail before it
        ([("libx264", 30, (96, 128), IMPAIRED), ("libx264", 30, (48, 64), DEFAULT)], 1),
        ([("libx264", 30, (96, 128), 0), ("libx264", 30, (96, 128), 0)], 0),
    ],
)
def test_of_several_video_streams_the_default_one_is_probed_and_read(tmp_path, suffix, streams, wanted, decoder):
    path = two_streams(tmp_path / f"a.{suffix}", *streams)
    with av.open(path) as container:
        assert container.streams.best("video").index == wanted
    _, frames, (height, width), _ = streams[wanted]
    info = probe(path)
    assert (info.width, info.height, info.frames, info.fps) == (
        width,
        height,
        frames,
        pytest.approx(FPS, rel=1e-2),
    )
    shown = read_frames(path, [0.0, 10 / FPS, 1.0], decoder=decoder)
    assert indices_of(shown) == [100 * wanted + p for p in (0, 10, 25)]


@pytest.mark.parametrize("suffix", ["mkv", "ts", "nut"])
def test_a_thumbnail_is_recognised_by_its_packets_where_headers_count_no_frames(tmp_path, suffix):
    streams = [("libx264", 2, (48, 64), 0), ("libx264", 30, (96, 128), 0)]
    path = two_streams(tmp_path / f"a.{suffix}", *streams)
    info = probe(path)
    assert (info.width, info.height, info.frames) == (128, 96, 30)
    for decoder in ("pyav", "decord"):
        assert indices_of(read_frames(path, [0.0, 10 / FPS], decoder=decoder)) == [100, 110]
    path = two_streams(tmp_path / f"b.{suffix}", *[(codec, 30, size, flags) for codec, _, size, flags in streams])
    assert probe(path).width == 64  # of equal ones the first, as players do


def circle(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside = ((x + 0.5) / width - 0.5) ** 2 * (width / height) ** 2 + ((y + 0.5) / height - 0.5) ** 2 < 0.16
    return np.repeat(inside[..., None], 3, 2).astype(np.uint8) * 255


def anamorphic(path: Path, ratio: Fraction, rotation: int = 0, codec: str = "libx264") -> Path:
    """3 frames of a circle, as displayed, of 128x96 stored pixels that are `ratio` times as wide as high."""
    stored = np.asarray(Image.fromarray(circle(96, round(128 * ratio))).resize((128, 96)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = ratio
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "avi", "ts"])
@pytest.mark.parametrize("ratio", [Fraction(4, 3), Fraction(8, 9), Fraction(2, 1)], ids=str)
@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_anamorphic_clips_have_their_displayed_size_and_shape(tmp_path, suffix, ratio, decoder):
    path = str(anamorphic(tmp_path / f"a.{suffix}", ratio))
    width = round(128 * ratio)
    info = probe(path)
    assert (info.width, info.height) == (width, 96)
    expected = circle(96, width).astype(int)
    assert np.abs(read_frames(path, [0.04], decoder=decoder)[0] - expected).mean() < 12
    crop = (width // 2 - 48, 0, 96, 96)
    fitted = read_frames(path, [0.04], decoder=decoder, fit=Fit(96, 96, crop))[0].permute(1, 2, 0).numpy()
    assert np.abs(fitted - expected[:, crop[0] : crop[0] + 96]).mean() < 12


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_a_turned_anamorphic_clip_is_stretched_before_it_is_turned(tmp_path, codec):
    path = str(anamorphic(tmp_path / "a.mp4", Fraction(4, 3), rotation=90, codec=codec))
    info = probe(path)
    assert (info.width, info.height) == (96, 171)
    frame = read_frames(path, [0.0])[0]
    assert frame.shape == (171, 96, 3)
    assert np.abs(frame - np.rot90(circle(96, 171)).astype(int)).mean() < 12


def test_an_absurd_pixel_shape_is_taken_for_a_slip(tmp_path):
    path = str(anamorphic(tmp_path / "a.mp4", Fraction(255, 2)))
    assert probe(path).width == 128 and read_frames(path, [0.0]).shape == (1, 96, 128, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_edit_lists_hide_and_delay_frames_of_every_codec(tmp_path, codec, suffix):
    clip = make(tmp_path / f"a.{suffix}", codec, "yuv420p")
    options = {"avoid_negative_ts": "disabled"}
    hidden = remux(clip, tmp_path / f"b.{suffix}", shift=-7 / FPS, options=options)
    assert probe(str(hidden)).frames == FRAMES - 7
    places = [0, 1, 5, 6, 20, 22]
    assert indices_of(read_frames(str(hidden), [p / FPS for p in places])) == [p + 7 for p in places]
    delayed = remux(clip, tmp_path / f"c.{suffix}", shift=2)
    assert indices_of(read_frames(str(delayed), [0, 0.4])) == [0, 10]


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_one_frame_is_an_image_in_every_codec(tmp_path, codec, suffix):
    path = str(write_clip(tmp_path / f"a.{suffix}", 1, codec=codec))
    assert probe(path).kind == "image"
    assert indices_of(read_frames(path, [0.0])) == [0]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_of_uneven_steps_is_probed_and_read_alike(tmp_path, suffix):
    frames = [Image.fromarray(pattern(i)) for i in range(5)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 300, 50, 200, 350])
    info = probe(str(path))
    assert info.frames == 5 and info.duration == pytest.approx(1.0)
    assert indices_of(read_frames(str(path), [0.05, 0.1, 0.39, 0.41, 0.46, 0.7, 0.99])) == [0, 1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_ten_bits_are_read_alike_by_every_decoder(tmp_path, codec, name):
    """Of real footage. decord itself rounds and enlarges colour otherwise."""
    path = str(tmp_path / "a.mp4")
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    with av.open(str(real_clip(name))) as source, av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        original = source.streams.video[0]
        stream.width, stream.height, stream.pix_fmt = original.width, original.height, "yuv420p10le"
        for number, frame in zip(range(8), source.decode(original)):
            deep = frame.reformat(format="yuv420p10le")
            deep.pts, deep.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(deep))
        container.mux(stream.encode(None))
    times = [0.0, 0.08, 0.28]
    pyav, decord = (read_frames(path, times, decoder=d) for d in ("pyav", "decord"))
    assert np.array_equal(pyav, decord)


def test_a_video_that_declares_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = str(make(tmp_path / "a.mp4", "libx264", "yuv420p"))
    monkeypatch.setattr("sat_ext.media.MAX_PIXELS", 128 * 96 - 1)
    decoded = []
    monkeypatch.setattr("sat_ext.data.decode.pyav.pick", lambda *a: decoded.append(a))
    for read in (lambda: probe(path), lambda: read_frames(path, [0.0])):
        with pytest.raises(MediaError, match=r"a\.mp4: 128x96 pixels, over the limit of 12287; scale it down"):
            read()
    assert not decoded
