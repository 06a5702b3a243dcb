"""Stills and animations, the part of decode.py that Pillow reads."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sat_ext.data.probe import probe
from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError
from tests.media import index_of, indices_of, pattern, read_frames, read_still, real_still

Chunks = Sequence[tuple[bytes, bytes]]
GRADIENT = np.stack(np.broadcast_arrays(np.arange(64) * 4, np.arange(48)[:, None] * 5, 128), axis=2).astype(
    np.uint8
)


def read(path: Path) -> np.ndarray:
    out = read_still(str(path))
    assert out.dtype == np.uint8 and out.ndim == 4 and out.shape[0] == 1 and out.shape[3] == 3
    assert out.flags.writeable and out.flags.c_contiguous
    info = probe(str(path))
    assert out.shape[1:3] == (info.height, info.width)
    return out[0]


def near(a: np.ndarray, b: np.ndarray, limit: int = 8) -> bool:
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= limit


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "jpg", "avif", "gif"])
def test_every_format_is_read(tmp_path, suffix):
    flat = np.full((48, 64, 3), (200, 100, 50), np.uint8)
    Image.fromarray(flat).save(tmp_path / f"a.{suffix}")
    assert near(read(tmp_path / f"a.{suffix}"), flat)


def test_lossless_formats_are_exact(tmp_path):
    for suffix, options in (("png", {}), ("bmp", {}), ("tiff", {}), ("webp", {"lossless": True})):
        Image.fromarray(GRADIENT).save(tmp_path / f"a.{suffix}", **options)
        assert np.array_equal(read(tmp_path / f"a.{suffix}"), GRADIENT)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, suffix, orientation):
    stored = Image.fromarray(
        np.kron(np.array([[250, 10], [120, 60], [180, 90]], np.uint8), np.ones((32, 32), np.uint8))
    )
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.convert("RGB").save(tmp_path / f"a.{suffix}", exif=exif)
    expected = turn(np.asarray(stored))[16::32, 16::32]
    assert near(read(tmp_path / f"a.{suffix}")[16::32, 16::32, 0], expected)


def test_transparency_is_flattened_on_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[0, :, 3], rgba[1, :, 3] = 200, 255, 128  # opaque, half, and two rows clear
    for name in ("a.png", "a.tiff", "a.webp"):
        options = {"lossless": True, "exact": True} if name == "a.webp" else {}
        Image.fromarray(rgba).save(tmp_path / name, **options)
        out = read(tmp_path / name)
        assert out[0, 0].tolist() == [200, 0, 0] and out[3, 3].tolist() == [255, 255, 255]
        assert near(out[1, 0], np.array([227, 127, 127], np.uint8), 1)
    Image.fromarray(rgba).convert("LA").save(tmp_path / "b.png")
    assert read(tmp_path / "b.png")[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1"])
def test_a_transparent_color_is_flattened_on_white(tmp_path, mode):
    picture = Image.new("RGB", (8, 8), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 4, 8))
    key = (0, 0, 0) if mode == "RGB" else 0
    picture.convert(mode).save(tmp_path / "a.png", transparency=key)
    assert read(tmp_path / "a.png").min() == 255


def test_palettes_grey_and_black_and_white_become_rgb(tmp_path):
    picture = Image.fromarray(np.kron(np.array([[0, 255], [90, 160]], np.uint8), np.ones((8, 8), np.uint8)))
    picture.save(tmp_path / "a.png")
    grey = np.asarray(picture)
    assert np.array_equal(read(tmp_path / "a.png"), np.stack([grey] * 3, 2))
    Image.fromarray(GRADIENT).quantize(200).save(tmp_path / "b.png")
    assert near(read(tmp_path / "b.png"), GRADIENT, 40)
    picture.convert("1", dither=Image.Dither.NONE).save(tmp_path / "c.png")
    assert set(np.unique(read(tmp_path / "c.png"))) == {0, 255}


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = (np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(grey).save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name)[..., 1], np.rint(grey / 257).astype(np.uint8))
    write_rgb48(tmp_path / "b.png", GRADIENT.astype(np.uint16) * 257)
    assert np.array_equal(read(tmp_path / "b.png"), GRADIENT)


def write_rgb48(path: Path, pixels: np.ndarray, *, before: Chunks = (), behind: Chunks = ()) -> None:
    """A PNG of 16 bits a channel, which Pillow does not write, with chunks before and behind its pixels."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    kind_of_pixels = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind_of_pixels, 0, 0, 0)),
        *before,
        (b"IDAT", zlib.compress(rows)),
        *behind,
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [*chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


def profile(space: bytes, gamma: float) -> bytes:
    """A small ICC profile (version 2) of sRGB's primaries, or of greys, named sRGB whatever its gamma is."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 12) + b"Linear sRGB\0" + bytes(78),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"cprt": b"text" + bytes(4) + b"none\0",
    }
    if space == b"RGB ":  # the primaries of sRGB, adapted to D50 (ICC's own sRGB profile)
        tags |= {b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971)}
        tags |= {b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s", 128 + len(table + body), b"none", 0x02000000, b"mntr", space, b"XYZ ",
                       struct.pack(">6H", 2020, 1, 1, 0, 0, 0), b"acsp").ljust(68, b"\0")  # fmt: skip
    return (head + xyz(0.9642, 1.0, 0.8249)[8:]).ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_a_color_profile_is_judged_by_what_it_does_and_not_by_its_name(tmp_path, mode, suffix):
    if "A" in mode and suffix == "jpg" or "L" in mode and suffix == "webp":
        pytest.skip(f"{suffix} has no {mode}")
    space = b"RGB " if "RGB" in mode else b"GRAY"
    stored = tuple(255 if band == "A" else 55 for band in mode)  # 0.2157 of the light is 128 in sRGB
    options = {"quality": 100} if suffix in ("jpg", "webp") else {}
    Image.new(mode, (8, 8), stored if len(stored) > 1 else 55).save(
        tmp_path / f"a.{suffix}", icc_profile=profile(space, 1.0), **options
    )
    assert near(read(tmp_path / f"a.{suffix}")[4, 4], np.array([128] * 3, np.uint8), 2)


def test_sixteen_bits_have_profiles_and_transparency_as_eight_have(tmp_path):
    light = np.full((4, 4, 3), round(0.2157 * 65535), np.uint16)
    for channels, space in ((1, b"GRAY"), (3, b"RGB ")):
        embedded = b"sRGB\0\0" + zlib.compress(profile(space, 1.0))
        write_rgb48(tmp_path / "a.png", light[..., :channels], before=[(b"iCCP", embedded)])
        assert near(read(tmp_path / "a.png")[0, 0], np.array([128] * 3, np.uint8), 2)
        key = struct.pack(f">{channels}H", *[0x1234] * channels)
        pixels = np.full((4, 4, channels), 0x1234, np.uint16)
        pixels[0] = 0x8080
        write_rgb48(tmp_path / "b.png", pixels, before=[(b"tRNS", key)])
        assert read(tmp_path / "b.png")[:, 0, 0].tolist() == [128, 255, 255, 255]
        with_alpha = np.concatenate([pixels, np.full((4, 4, 1), 0, np.uint16)], axis=2)
        with_alpha[0, :, -1] = 0xFFFF
        write_rgb48(tmp_path / "c.png", with_alpha)
        assert read(tmp_path / "c.png")[:, 0, 0].tolist() == [128, 255, 255, 255]


def test_sixteen_bit_greys_with_opacity_have_their_profile_applied(tmp_path):
    pixels = np.full((4, 4, 2), (round(0.2157 * 65535), 0xFFFF), np.uint16)
    pixels[0, :, 1] = 0
    embedded = b"sRGB\0\0" + zlib.compress(profile(b"GRAY", 1.0))
    write_rgb48(tmp_path / "a.png", pixels, before=[(b"iCCP", embedded)])
    assert near(read(tmp_path / "a.png")[:, 0, 0], np.array([255, 128, 128, 128], np.uint8), 2)


def write_tiff(
    path: Path,
    samples: bytes,
    *,
    bits: Sequence[int] = (16,),
    photometric: int = 1,
    planes: int = 1,
    sign: int = 1,
) -> None:
    """4 x 4 uncompressed pixels of kinds that Pillow does not write."""
    short, count = 3, len(bits)
    tags = [(256, 1, 4), (257, 1, 4), (258, count, bits[0]), (259, 1, 1), (262, 1, photometric)]
    tags += [(273, 1, 8), (277, 1, count), (278, 1, 4), (279, 1, len(samples)), (284, 1, planes), (339, 1, sign)]
    end = 8 + len(samples)
    if count > 1:  # values that do not fit into four bytes stand behind the pixels, planes one after another
        more = struct.pack(f"<{count}H", *bits) + b"".join(
            struct.pack("<I", 8 + n * len(samples) // count) for n in range(count)
        )
        tags[2], tags[5] = (258, count, end), (273, count, end + 2 * count)
        tags[8] = (279, count, end + len(more))
        samples += more + struct.pack("<I", len(samples) // count) * count
        end = 8 + len(samples)
    long_tags = (273, 279)
    fields = [struct.pack("<HHII", tag, 4 if tag in long_tags else short, n, value) for tag, n, value in tags]
    ifd = struct.pack("<H", len(fields)) + b"".join(fields) + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, end) + samples + ifd)


def test_deep_tiffs_are_read_as_their_tags_say_or_refused(tmp_path):
    path = tmp_path / "a.tiff"
    write_tiff(path, np.full(16, 0x4000, "<u2").tobytes(), photometric=0)  # 0 is white
    assert read(path)[0, 0].tolist() == [191] * 3
    write_tiff(path, b"\x80\x08\x00" * 8, bits=(12,))  # 0x800 twice in three bytes
    assert near(read(path)[0, 0], np.array([128] * 3, np.uint8), 1)
    for samples, options, reason in (
        (
            np.full(48, 0x8000, "<u2"),
            {"bits": (16,) * 3, "photometric": 2, "planes": 2},
            "separate planes of 16 bits",
        ),
        (np.full(16, 1 << 31, "<u4"), {"bits": (32,)}, "pixels of 32 bits or with a sign"),
        (np.full(16, 1000, "<i2"), {"sign": 2}, "pixels of 32 bits or with a sign"),
    ):
        write_tiff(path, samples.tobytes(), **options)
        with pytest.raises(MediaError, match=f"a.tiff: not a readable image: {reason}.* save it with"):
            read(path)


def test_a_png_without_profile_has_its_gamma_applied(tmp_path):
    pixels = np.full((4, 4, 3), 0x3737, np.uint16)
    for gamma, expected in ((1.0, 128), (0.45455, 55)):
        write_rgb48(tmp_path / "a.png", pixels, before=[(b"gAMA", struct.pack(">I", round(gamma * 100_000)))])
        assert near(read(tmp_path / "a.png")[0, 0], np.array([expected] * 3, np.uint8), 2)


PQ, CINEMA, HLG, SRGB, BT2020, P3 = 16, 17, 18, 13, 9, 12  # ITU-T H.273


@pytest.mark.parametrize(
    ("transfer", "primaries", "stored", "expected"),
    [
        (PQ, BT2020, (148, 148, 148), (255, 255, 255)),  # 203 cd/m2 are 58 % of PQ's signal (BT.2408, table 1)
        (HLG, BT2020, (191, 191, 191), (255, 255, 255)),
        (SRGB, P3, (234, 51, 35), (255, 0, 0)),  # sRGB's red in Display P3
        (SRGB, 1, (200, 100, 50), (200, 100, 50)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "avif", "heic"])
def test_colours_that_a_file_gives_in_numbers_become_srgb(tmp_path, suffix, transfer, primaries, stored, expected):
    path = tmp_path / f"a.{suffix}"
    if suffix == "png":
        code = bytes([primaries, transfer, 0, 1])
        write_rgb48(path, np.full((16, 16, 3), stored, np.uint16) * 257, before=[(b"cICP", code)])
    else:
        if suffix == "heic":
            pytest.importorskip("pillow_heif").register_heif_opener()
        Image.new("RGB", (64, 64), stored).save(path, quality=100, subsampling="4:4:4")
        written = path.read_bytes()
        assert written.count(b"colrnclx") == 1
        at = written.index(b"colrnclx") + 8
        path.write_bytes(written[:at] + struct.pack(">HH", primaries, transfer) + written[at + 4 :])
    assert near(read(path)[8, 8], np.array(expected, np.uint8), 5)


@pytest.mark.parametrize(("transfer", "white"), [(PQ, 0.58069), (HLG, 0.75), (CINEMA, (48 / 52.37) ** (1 / 2.6))])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_colours_in_numbers_count_for_greys_too(tmp_path, transfer, white, channels):
    pixels = np.full((4, 4, channels), round(white * 65535), np.uint16)
    if channels in (2, 4):
        pixels[..., -1] = 0xFFFF
    write_rgb48(tmp_path / "a.png", pixels, before=[(b"cICP", bytes([BT2020, transfer, 0, 1]))])
    assert near(read(tmp_path / "a.png")[0, 0], np.array([255] * 3, np.uint8), 2)


def test_an_orientation_in_xmp_alone_turns_size_and_pixels_or_neither(tmp_path):
    words = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    for suffix in ("tiff", "jpg", "webp", "avif", "gif"):
        tags = {"tiffinfo": {700: words}} if suffix == "tiff" else {"xmp": words}
        Image.fromarray(GRADIENT).save(tmp_path / f"a.{suffix}", **tags)
        shape = read(tmp_path / f"a.{suffix}").shape  # compares it with the probe's
        assert shape == ((48, 64, 3) if suffix in ("tiff", "gif") else (64, 48, 3))


def test_exif_data_behind_the_pixels_counts_for_neither_size_nor_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    chunk = [(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))]
    wide = np.broadcast_to(np.uint16(900), (40, 60, 3))
    write_rgb48(tmp_path / "a.png", wide, behind=chunk)
    assert read(tmp_path / "a.png").shape == (40, 60, 3)
    write_rgb48(tmp_path / "b.png", wide, before=chunk)
    assert read(tmp_path / "b.png").shape == (60, 40, 3)


def photograph(**options: object) -> bytes:
    buffer = io.BytesIO()
    with Image.open(real_still("coffee.png")) as image:
        image.convert(str(options.pop("mode", "RGB"))).resize((240, 160)).save(
            buffer, "JPEG", quality=90, **options
        )
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}], ids=str)
@pytest.mark.parametrize("fit", [None, Fit(16, 16)], ids=["whole", "smaller"])
def test_a_damaged_jpeg_is_bad_and_not_what_the_decoder_makes_up(tmp_path, options, fit):
    path, content = tmp_path / "a.jpg", bytearray(photograph(**options))
    path.write_bytes(content)
    read_still(str(path), fit=fit)
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(range(40, 80))
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"not a readable image: (damaged|truncated) \(.*JPEG"):
        read_still(str(path), fit=fit)


def test_padding_before_a_jpegs_end_and_an_end_that_is_not_marked_are_no_damage(tmp_path):
    content = photograph()
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    whole = read(path)
    for other in (content[:-2] + bytes(12) + content[-2:], content[:-2], content[:-1], content + b"more"):
        path.write_bytes(other)
        assert np.array_equal(read(path), whole)
    path.write_bytes(content[:-2] + b"anything else" + content[-2:])
    with pytest.raises(MediaError, match="damaged .*extraneous bytes"):
        read(path)


def boxed(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def full_box(kind: bytes, content: bytes, *, version: int = 0, flags: int = 0) -> bytes:
    return boxed(kind, struct.pack(">I", version << 24 | flags) + content)


def write_tiled_heic(path: Path, colors: Sequence[tuple[int, int, int]], side: int = 128) -> None:
    """Four tiles and the grid that puts them together, as telephones write it (ISO/IEC 23008-12, 6.6.2.3)."""
    tiles = []
    for color in colors:
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), color).save(buffer, "HEIF", quality=95)
        coded = buffer.getvalue()
        at = coded.find(b"hvcC") - 4
        decoder = coded[at : at + struct.unpack(">I", coded[at : at + 4])[0]]
        at = coded.find(b"mdat") - 4
        tiles.append(coded[at + 8 : at + struct.unpack(">I", coded[at : at + 4])[0]])
    items = [*tiles, struct.pack(">BBBBHH", 0, 0, 1, 1, 2 * side, 2 * side)]  # the last: 2 rows, 2 columns
    entries = [
        full_box(b"infe", struct.pack(">HH4sB", n, 0, b"grid" if n == 5 else b"hvc1", 0), version=2, flags=n < 5)
        for n in range(1, 6)
    ]
    sizes = [full_box(b"ispe", struct.pack(">II", n, n)) for n in (side, 2 * side)]
    properties = boxed(b"ipco", decoder + sizes[0] + sizes[1])
    uses = b"".join(struct.pack(">HBBB", n, 2, 0x81, 2) for n in range(1, 5)) + struct.pack(">HBB", 5, 1, 3)
    properties += full_box(b"ipma", struct.pack(">I", 5) + uses)

    def meta(start: int) -> bytes:
        places = b""
        for number, item in enumerate(items, 1):
            places += struct.pack(">HHHII", number, 0, 1, start, len(item))
            start += len(item)
        return full_box(
            b"meta",
            full_box(b"hdlr", bytes(4) + b"pict" + bytes(13))
            + full_box(b"pitm", struct.pack(">H", 5))
            + full_box(b"iloc", struct.pack(">BBH", 0x44, 0, 5) + places)
            + full_box(b"iinf", struct.pack(">H", 5) + b"".join(entries))
            + full_box(b"iref", boxed(b"dimg", struct.pack(">HH4H", 5, 4, 1, 2, 3, 4)))
            + boxed(b"iprp", properties),
        )

    head = boxed(b"ftyp", b"heic" + bytes(4) + b"mif1heic")
    path.write_bytes(head + meta(len(head) + len(meta(0)) + 8) + boxed(b"mdat", b"".join(items)))


def test_a_heic_of_tiles_is_read_whole(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    colors = [(220, 40, 40), (40, 200, 60), (50, 70, 220), (230, 220, 60)]
    write_tiled_heic(tmp_path / "IMG_0001.HEIC", colors)
    out = read(tmp_path / "IMG_0001.HEIC")
    assert out.shape == (256, 256, 3)
    for color, (row, column) in zip(colors, [(64, 64), (64, 192), (192, 64), (192, 192)], strict=True):
        assert near(out[row, column], np.array(color, np.uint8), 4)
    (tmp_path / "IMG_0001.HEIC").rename(tmp_path / "a.mov")
    for look in (probe, lambda path: read_frames(path, [0.0])):
        with pytest.raises(MediaError, match=r"a\.mov: a HEIF or AVIF picture and not a video; name it \.heic"):
            look(str(tmp_path / "a.mov"))


def test_without_pillow_heif_a_heic_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("sat_ext.media.image_formats", lambda: ("JPEG", "PNG"))
    (tmp_path / "a.heic").write_bytes(boxed(b"ftyp", b"heic" + bytes(4) + b"mif1heic") + bytes(64))
    with pytest.raises(MediaError, match=r"pip install 'sat_ext\[heif\]', or convert it to JPEG"):
        probe(str(tmp_path / "a.heic"))


def test_a_format_that_runs_a_program_is_not_read_under_another_ending(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(MediaError, match="not a readable image: unknown format"):
        read_still(str(tmp_path / "a.jpg"))


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(MediaError, match="floating point pixels have no defined range; save it with 8 or 16 bits"):
        read_still(str(tmp_path / "a.tiff"))


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert near(read(tmp_path / "a.jpg")[8, 8], np.array([255, 0, 0], np.uint8), 4)


def swapped_profile() -> bytes:
    """sRGB with its red and green primaries exchanged: what it calls red is our green."""
    content = bytearray(
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"s\0R\0G\0B", b"t\0e\0s\0t")
    )
    count = struct.unpack(">I", content[128:132])[0]
    entries = {bytes(content[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    content[red : red + 4], content[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(content)


def test_color_profiles_are_converted_to_srgb(tmp_path):
    for mode, red in (("RGB", (250, 10, 10)), ("RGBA", (250, 10, 10, 255))):
        Image.new(mode, (8, 8), red).save(tmp_path / "a.png", icc_profile=swapped_profile())
        out = read(tmp_path / "a.png")[0, 0].astype(int)
        assert out[1] > 200 and out[0] < 60
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(GRADIENT).save(tmp_path / "b.png", icc_profile=srgb)
    assert np.array_equal(read(tmp_path / "b.png"), GRADIENT)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_broken_or_unfit_color_profile_is_left_aside(tmp_path, mode):
    for profile in (b"not a profile", swapped_profile() if mode != "RGB" else b"\0" * 200):
        Image.new(mode, (8, 8), 100 if mode == "L" else (0,) * len(mode)).save(
            tmp_path / "a.tiff", icc_profile=profile
        )
        assert len(np.unique(read(tmp_path / "a.tiff"))) == 1


def test_broken_stills_say_what_is_wrong(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(GRADIENT).save(buffer, "JPEG", quality=95)
    for name, content, reason in [
        ("cut.jpg", buffer.getvalue()[:-600], "not a readable image: .*[Tt]runcated"),
        ("text.png", b"not an image", "not a readable image: unknown format"),
        ("empty.webp", b"", "the file is empty"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=reason):
            read_still(str(tmp_path / name))
    with pytest.raises(MediaError, match=r"gone\.png: no such file"):
        read_still(str(tmp_path / "gone.png"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_still_over_the_pixel_limit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "b.png")
    with pytest.raises(MediaError, match=r"b\.png: 400000000 pixels, over the limit of 89478485$"):
        read_still(str(tmp_path / "b.png"))
    monkeypatch.setattr("sat_ext.media.MAX_PIXELS", 64 * 48 - 1)
    Image.fromarray(GRADIENT).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="64x48 pixels, over the limit of 3071"):
        read_still(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "name", ["astronaut.png", "coffee.png", "camera.png", "rocket.jpg", "logo.png", "horse.png"]
)
def test_real_stills_are_read(name):
    path = real_still(name)
    out = read(path)
    with Image.open(path) as image:
        if image.mode in ("RGB", "L") and "icc_profile" not in image.info:
            assert near(out, np.asarray(image.convert("RGB")), 0)
    assert out.std() > 5


def animation(path: Path) -> Path:
    """Frames 0..5, the third for 0.3 s and the others for 0.1 s."""
    frames = [Image.fromarray(pattern(i)) for i in range(6)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=[100, 100, 300, 100, 100, 100], **options
    )
    return path


@pytest.mark.parametrize("suffix", ["gif", "webp"])
@pytest.mark.parametrize("decoder", ["auto", "decord"])
def test_animations_are_read_by_time(tmp_path, suffix, decoder):
    path = str(animation(tmp_path / f"a.{suffix}"))
    times = [0, 0.05, 0.1, 0.2, 0.49, 0.5, 0.7, 5.0, 0.0]
    assert indices_of(read_frames(path, times, decoder=decoder)) == [0, 0, 1, 2, 2, 3, 5, 5, 0]
    assert indices_of(read_frames(path, [0.6], decoder=decoder)) == [4]
    assert index_of(read_still(path)[0]) == 0


@pytest.mark.parametrize("suffix", ["gif", "webp"])
@pytest.mark.parametrize("ending", ["gif", "webp", "jpg", "png"])
def test_an_animation_is_read_by_its_content_whatever_its_ending_is(tmp_path, suffix, ending):
    path = animation(tmp_path / f"a.{suffix}").rename(tmp_path / f"b.{ending}")
    assert probe(str(path)).frames == 6
    for decoder in ("auto", "decord"):
        assert indices_of(read_frames(str(path), [0, 0.1, 0.49, 0.5], decoder=decoder)) == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_is_flattened_on_white(tmp_path, suffix):
    frames = []
    for i in range(3):
        frame = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        frame.paste((200, 0, 0, 255), (i * 4, 0, i * 4 + 4, 16))
        frame.putpixel((15, 15), (0, 0, 0, 128))  # or WebP's encoder calls a cut-out of the frame opaque
        frames.append(frame)
    path = tmp_path / f"a.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {"disposal": 2}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
    for i, frame in enumerate(read_frames(str(path), [0.0, 0.1, 0.2])):
        assert near(frame[8, i * 4 + 1], np.array([200, 0, 0], np.uint8), 2)
        assert (frame[:, (i * 4 + 8) % 16] == 255).all()


def test_a_broken_animation_is_an_error(tmp_path):
    path = animation(tmp_path / "a.webp")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(MediaError, match="not a readable image"):
        read_frames(str(path), [0.0, 0.7])
