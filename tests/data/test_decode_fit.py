"""Frames fitted as they are decoded, and pictures decoded no larger than they are needed."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from sat_ext.data.transform import Fit
from sat_ext.errors import MediaError
from tests.media import pattern, read_frames, read_still, real_clip, real_still, write_clip

TIMES = [0.0, 1.0, 0.3, 1.96]


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize("fit", [Fit(48, 64), Fit(96, 128), Fit(64, 32, crop=(10, 4, 60, 90))], ids=str)
def test_frames_are_fitted_as_they_are_decoded(tmp_path, fit, decoder):
    path = str(write_clip(tmp_path / "a.mp4", 50, 25))
    fitted = read_frames(path, TIMES, decoder=decoder, fit=fit)
    assert fitted.dtype == torch.uint8 and fitted.shape == (4, 3, fit.height, fit.width) and fitted.is_contiguous()
    assert torch.equal(fitted, torch.stack([fit(frame) for frame in read_frames(path, TIMES)]))


def test_an_animation_and_a_still_are_fitted(tmp_path):
    frames = [Image.fromarray(pattern(i)) for i in range(4)]
    path = str(tmp_path / "a.webp")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    fit = Fit(32, 48)
    assert torch.equal(read_frames(path, [0.0, 0.2], fit=fit)[1], fit(pattern(2)))
    assert torch.equal(read_still(path, fit=fit), fit(pattern(0))[None])


def test_a_crop_outside_the_file_is_a_fault_of_the_file(tmp_path):
    clip = str(write_clip(tmp_path / "a.mp4", 5))
    Image.fromarray(pattern(0)).save(tmp_path / "a.jpg")
    fit = Fit(32, 32, crop=(100, 0, 64, 64))
    for read in (lambda: read_frames(clip, [0.0], fit=fit), lambda: read_still(str(tmp_path / "a.jpg"), fit=fit)):
        with pytest.raises(
            MediaError, match=r"a\.\w+: its crop \[100, 0, 64, 64\] .* is outside its 128x96 pixels"
        ):
            read()


def photograph(path: Path, width: int, height: int, **options) -> Path:
    with Image.open(real_still("coffee.png")) as image:
        image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(path, quality=92, **options)
    return path


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * float(torch.log10(255**2 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize("size", [(1300, 900), (803, 1207), (640, 2000)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = photograph(tmp_path / "a.jpg", *size, exif=exif)
    decoded = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **o: decoded.append(decode(*a, **o)) or decoded[-1])
    for fit in (Fit(72, 108), Fit(48, 72, crop=(160, 80, 460, 480))):
        whole = fit(read_still(str(path))[0])
        assert decibels(read_still(str(path), fit=fit)[0], whole) > 36
        smaller = decoded[-1]
        with Image.open(path) as image:  # Pillow's way to the same
            image.draft(None, (smaller.shape[1] - 1, smaller.shape[0] - 1))  # it rounds down
            assert image.size[0] < size[0] and np.array_equal(np.asarray(image), smaller)


def test_a_jpeg_of_less_than_five_times_the_target_is_decoded_whole(tmp_path):
    path = photograph(tmp_path / "a.jpg", 700, 480)
    fit = Fit(96, 144)
    assert torch.equal(read_still(str(path), fit=fit)[0], fit(read_still(str(path))[0]))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_simplejpeg_changes_no_pixel(tmp_path, options):
    path = photograph(tmp_path / "a.jpg", 333, 217, **options)
    with Image.open(path) as image:
        assert np.array_equal(read_still(str(path))[0], np.asarray(image))


def test_cmyk_and_color_profiles_hold_where_a_jpeg_is_decoded_smaller(tmp_path):
    Image.new("CMYK", (1200, 900), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    out = read_still(str(tmp_path / "a.jpg"), fit=Fit(96, 96))[0]
    assert out[0].min() > 245 and out[1:].max() < 10


def test_memory_does_not_grow_with_the_frames_of_a_clip():
    """PyAV's frames that are asked for side data live until cycles are collected, which can take a while."""
    import gc

    path = str(real_clip("bigbuckbunny.mp4"))
    gc.collect()
    gc.disable()
    try:
        read_frames(path, [k / 25 for k in range(30)], fit=Fit(48, 72))
        alive = sum(isinstance(each, av.VideoFrame) for each in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= 2


def test_wide_pixels_are_shown_square():
    """Carphone was made for television: what is stored as 176x144 is displayed wider."""
    path = str(real_clip("carphone_pristine.mp4"))
    with av.open(path) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
        ratio = container.streams.video[0].sample_aspect_ratio
    frames = read_frames(path, [0.0])
    height, width = stored.shape[:2]
    assert 1.08 < ratio < 1.1 and frames.shape == (1, height, round(width * ratio), 3)
    fitted = read_frames(path, [0.0], fit=Fit(72, 72))[0]
    assert decibels(fitted, Fit(72, 72)(np.ascontiguousarray(frames[0]))) > 35
