"""Colours of clips: HDR and wide primaries as sRGB, whatever the pixel format; exact chroma; alpha on white."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from sat_ext.colour import to_srgb
from sat_ext.data.decode.rgb import Converter
from sat_ext.data.probe import probe
from sat_ext.errors import MediaError
from sat_ext.media import open_video
from tests.media import read_frames

# H.273's code points: transfers, primaries and matrices
BT709, UNSPECIFIED, LINEAR, SRGB, BT2020_10, PQ, CINEMA, HLG = 1, 2, 8, 13, 14, 16, 17, 18
BT2020, DCI_P3, DISPLAY_P3 = 9, 11, 12

COLOURS = [(255, 255, 255), (128, 128, 128), (20, 20, 20), (255, 0, 0), (0, 0, 255), (220, 180, 150), (30, 90, 60)]

# Linear sRGB to linear light of other primaries: ITU-R BT.2087 (its inverse), SMPTE EG 432-1.
FROM_SRGB = {
    BT709: np.eye(3),
    BT2020: [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]],
    DISPLAY_P3: [[0.8225, 0.1774, 0.0000], [0.0332, 0.9669, 0.0000], [0.0171, 0.0724, 0.9108]],
}


def linear(colour: tuple[int, int, int]) -> np.ndarray:
    signal = np.array(colour) / 255
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def signal_of(light: np.ndarray, transfer: int) -> np.ndarray:
    """The signal of light where 1 is diffuse white."""
    if transfer == LINEAR:
        return light
    if transfer == PQ:
        y = np.clip(light * 203 / 10000, 0, 1) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    if transfer == HLG:
        e = light * 0.265
        high = 0.17883277 * np.log(np.maximum(12 * e - 0.28466892, 1e-6)) + 0.55991073
        return np.where(e <= 1 / 12, np.sqrt(3 * e), high)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def planes_of(signal: np.ndarray, pixel_format: str, full: bool, kr: float, kb: float) -> list[int]:
    """A signal (R, G, B) from 0 to 1 as the values of a format's planes."""
    bits = next((n for n in (10, 12) if str(n) in pixel_format), 8)
    r, g, b = signal
    top = (1 << bits) - 1
    if pixel_format.startswith("gbrp"):
        return [round(top * v) for v in (g, b, r)]
    y = kr * r + (1 - kr - kb) * g + kb * b
    half = [(b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))]
    if full:
        return [round(top * y), *(min(top, round((1 << bits - 1) + top * v)) for v in half)]
    unit = 1 << (bits - 8)
    return [round(unit * (16 + 219 * y)), *(round(unit * (128 + 224 * v)) for v in half)]


def flat_clip(
    path: Path, planes: list[int], pixels: str, *, matrix: int, transfer: int, primaries: int, full: bool = False
) -> str:
    """4 frames of one colour without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = pixels
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = matrix, primaries, transfer
        context.color_range = 2 if full else 1
        for number in range(4):
            frame = av.VideoFrame(64, 64, pixels)
            frame.pts = number
            for plane, value in zip(frame.planes, planes):
                wide = frame.format.components[0].bits > 8
                plane.update(np.full(plane.buffer_size // (1 + wide), value, "<u2" if wide else "u1").tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize("pixel_format", ["yuv420p10le", "yuv444p12le", "gbrp10le", "yuv422p10le full"])
@pytest.mark.parametrize(
    ("transfer", "primaries"),
    [(PQ, BT2020), (HLG, BT2020), (BT2020_10, BT2020), (BT709, DISPLAY_P3), (PQ, DISPLAY_P3), (HLG, BT709)],
)
def test_hdr_and_wide_primaries_come_out_as_srgb(tmp_path, transfer, primaries, pixel_format):
    pixel_format, _, full = pixel_format.partition(" ")
    for number, colour in enumerate(COLOURS):
        signal = signal_of(np.array(FROM_SRGB[primaries]) @ linear(colour), transfer)
        wide = primaries == BT2020
        planes = planes_of(signal, pixel_format, bool(full), *((0.2627, 0.0593) if wide else (0.2126, 0.0722)))
        matrix = 0 if pixel_format.startswith("gbrp") else 9 if wide else 1
        name = tmp_path / f"{number}.mkv"
        path = flat_clip(
            name, planes, pixel_format, matrix=matrix, transfer=transfer, primaries=primaries, full=bool(full)
        )
        got = read_frames(path, [0.0, 0.3])[:, 9, 9].astype(int)
        assert np.abs(got - colour).max() <= 3, (colour, got)
        assert np.array_equal(read_frames(path, [0.0, 0.3], decoder="decord")[:, 9, 9], got)


def test_light_above_diffuse_white_is_white_and_colours_outside_srgb_are_clipped():
    white, peak, green = (0.58069,) * 3, (1.0,) * 3, (0.0, 0.58069, 0.0)
    rgb = np.rint(65535 * np.array([[white, peak, green]])).astype(np.uint16)
    assert to_srgb(PQ, BT2020)(rgb).tolist() == [[[255, 255, 255], [255, 255, 255], [0, 255, 0]]]


def test_eight_bits_and_dci_white_are_converted_too():
    rgb = np.array([[(255, 255, 255), (0, 0, 0)]], np.uint8)
    for primaries in (BT2020, DCI_P3, DISPLAY_P3):
        assert to_srgb(BT709, primaries)(rgb).tolist() == [[[255] * 3, [0] * 3]]
    assert to_srgb(LINEAR, BT709)(np.array([[(55, 55, 55)]], np.uint8)).tolist() == [[[128] * 3]]
    assert all(to_srgb(t, p) is None for t in (BT709, UNSPECIFIED, SRGB, BT2020_10) for p in (1, 2, 5, 6))


def test_digital_cinema_is_converted_once_whatever_its_pixels_are(tmp_path):
    white = round((48 / 52.37) ** (1 / 2.6) * 65535)
    assert to_srgb(CINEMA, DISPLAY_P3)(np.full((1, 1, 3), white, np.uint16)).tolist() == [[[255] * 3]]
    with av.open(str(tmp_path / "a.nut"), "w") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "xyz12le"
        frame = av.VideoFrame(64, 64, "xyz12le")
        frame.planes[0].update(np.full(frame.planes[0].buffer_size // 2, white, "<u2").tobytes())
        container.mux(stream.encode(frame))
    with open_video(str(tmp_path / "a.nut")) as (container, stream):
        frame = next(container.decode(stream))
        untagged, _ = Converter("", stream)((frame, False))
        untagged = untagged.copy()
        stream.codec_context.color_trc = CINEMA  # which NUT cannot say
        tagged, _ = Converter("", stream)((frame, False))
    assert np.array_equal(tagged, untagged)


@pytest.mark.parametrize(("matrix", "name"), [(10, "constant luminance"), (14, "ICtCp"), (15, "IPT-C2")])
def test_matrices_that_ffmpeg_does_not_undo_are_refused(tmp_path, matrix, name):
    path = flat_clip(tmp_path / "a.mkv", [512] * 3, "yuv420p10le", matrix=matrix, transfer=PQ, primaries=BT2020)
    for read in (lambda: probe(path), lambda: read_frames(path, [0.0])):
        with pytest.raises(MediaError, match=f"its colours are .*{name}.*convert it to BT.709"):
            read()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "pixel_format",
    ["yuv422p", "yuv411p", "yuv440p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv440p10le", "yuv420p12le"],
)
def test_chroma_is_exact_in_every_format_but_the_quick_one(tmp_path, pixel_format, full):
    for number, colour in enumerate([*COLOURS, (0, 255, 0), (10, 200, 240)]):
        planes = planes_of(np.array(colour) / 255, pixel_format, full, 0.2126, 0.0722)
        name = tmp_path / f"{number}.mkv"
        path = flat_clip(name, planes, pixel_format, matrix=1, transfer=BT709, primaries=BT709, full=full)
        got = read_frames(path, [0.0])[0, 9, 9].astype(int)
        assert np.abs(got - colour).max() <= (1 if "p1" in pixel_format else 2), (colour, got)  # 8 bits round more
        assert np.array_equal(read_frames(path, [0.0], decoder="decord")[0, 9, 9], got)


def transparent_clip(path: Path, codec: str, pixel_format: str = "yuva420p") -> str:
    """10 frames: red on the right, and on the left, where nothing is to be seen, green."""
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:, :32], picture[:, 32:] = (0, 200, 0, 0), (200, 0, 0, 255)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = pixel_format
        if codec.startswith("libvpx"):
            stream.codec_context.options = {"auto-alt-ref": "0"}
        for _ in range(10):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format=pixel_format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("codec", "suffix", "pixel_format"),
    [
        ("libvpx", "webm", "yuva420p"),
        ("libvpx-vp9", "webm", "yuva420p"),
        ("libvpx-vp9", "mkv", "yuva420p"),
        ("ffv1", "mkv", "yuva420p"),
        ("prores_ks", "mov", "yuva444p10le"),
        ("qtrle", "mov", "argb"),
    ],
)
def test_transparency_is_flattened_on_white_in_every_codec(tmp_path, codec, suffix, pixel_format, decoder):
    path = transparent_clip(tmp_path / f"a.{suffix}", codec, pixel_format)
    info = probe(path)
    assert (info.width, info.height, info.frames) == (64, 64, 10)
    for frame in read_frames(path, [0.0, 0.5, 1.2], decoder=decoder).astype(int):
        assert np.abs(frame[32, 9] - 255).max() <= 3 and np.abs(frame[32, 55] - (200, 0, 0)).max() <= 8
    assert len(read_frames(path, [0.9], decoder=decoder)) == 1


def test_transparency_that_this_ffmpeg_drops_is_an_error(tmp_path, monkeypatch):
    """A mock: the decoders of this FFmpeg are all there."""
    monkeypatch.setattr("sat_ext.media._ALPHA_DECODERS", {"vp9": "libvpx-none"})
    path = transparent_clip(tmp_path / "a.webm", "libvpx-vp9")
    for read in (lambda: probe(path), lambda: read_frames(path, [0.0])):
        with pytest.raises(MediaError, match="drops its transparency .it has no libvpx-none.; flatten it"):
            read()
