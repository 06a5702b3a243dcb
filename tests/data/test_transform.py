from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sat_ext.data.transform import Fit


def to_bucket(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    return torch.stack([Fit(height, width)(frame) for frame in frames])


def gradient(height: int, width: int, frames: int = 1) -> np.ndarray:
    """Red grows to the right and green downwards, from 0 to 255; blue is the frame's number."""
    image = np.zeros((frames, height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    image[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    image[..., 2] = np.arange(frames)[:, None, None]
    return image


def test_frames_become_channels_first_uint8_of_the_buckets_size():
    out = to_bucket(gradient(90, 160, frames=5), 48, 64)
    assert out.shape == (5, 3, 48, 64) and out.dtype == torch.uint8 and out.is_contiguous()
    assert out[:, 2].float().mean((1, 2)).tolist() == [0, 1, 2, 3, 4]


def test_frames_of_the_buckets_size_pass_unchanged_and_are_not_shared():
    frames = gradient(48, 64, frames=2)
    out = to_bucket(frames, 48, 64)
    assert torch.equal(out, torch.from_numpy(frames).permute(0, 3, 1, 2))
    frames[:] = 7
    assert out.float().mean() != 7


def test_a_wide_frame_loses_its_sides_equally_and_nothing_of_its_height():
    red, green = to_bucket(gradient(100, 300), 50, 50)[0, :2].float()
    assert green.min() < 4 and green.max() > 251
    assert red[:, 0].mean() == pytest.approx(85, abs=3) and red[:, -1].mean() == pytest.approx(170, abs=3)


def test_a_tall_frame_loses_top_and_bottom_equally():
    red, green = to_bucket(gradient(300, 100), 50, 50)[0, :2].float()
    assert red.min() < 4 and red.max() > 251
    assert green[0].mean() == pytest.approx(85, abs=3) and green[-1].mean() == pytest.approx(170, abs=3)


def test_the_resize_is_antialiased_and_close_to_pillows():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (240, 360, 3), np.uint8)
    ours = to_bucket(noise[None], 80, 120)[0].permute(1, 2, 0).numpy().astype(int)
    pillows = np.asarray(Image.fromarray(noise).resize((120, 80), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - pillows).max() <= 2


def test_small_frames_are_enlarged():
    assert to_bucket(gradient(3, 2), 48, 64).shape == (1, 3, 48, 64)


def test_read_only_and_strided_frames_are_taken():
    frames = gradient(60, 90).swapaxes(1, 2)[:, ::-1]
    frames.flags.writeable = False
    assert to_bucket(np.ascontiguousarray(frames), 32, 32).shape == (1, 3, 32, 32)
    assert torch.equal(to_bucket(frames, 32, 32), to_bucket(np.ascontiguousarray(frames), 32, 32))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([(16, 16), (48, 64), (64, 48), (16, 96)]))
def test_every_size_reaches_every_bucket(height, width, bucket):
    assert to_bucket(np.full((1, height, width, 3), 90, np.uint8), *bucket).unique().tolist() == [90]


def test_the_crop_is_cut_out_before_the_centre():
    image = gradient(100, 300)[0]
    out = Fit(50, 50, crop=(200, 0, 80, 60))(image)
    assert torch.equal(out, Fit(50, 50)(image[:60, 200:280]))
    red, green = out[:2].float()
    assert red.min() > 170 and green.max() < 160  # the right, and the upper part


def test_a_crop_outside_the_frame_is_refused():
    for crop in ((-1, 0, 10, 10), (95, 0, 10, 10), (0, 31, 100, 50)):
        with pytest.raises(
            ValueError, match=r"its crop \[.*\] \(left, top, width, height\) is outside its 100x80"
        ):
            Fit(48, 48, crop=crop)(gradient(80, 100)[0])


def test_pixels_that_are_not_square_are_stretched():
    """A circle that was stored at half of its width comes out round."""
    y, x = np.mgrid[:200, :300]
    round_one = np.repeat(((x - 150) ** 2 + (y - 100) ** 2 < 80**2)[..., None], 3, 2).astype(np.uint8) * 255
    stored = np.ascontiguousarray(round_one[:, ::2])
    for crop in (None, (40, 0, 200, 200)):
        exact, stretched = Fit(96, 96, crop)(round_one), Fit(96, 96, crop)(stored, (300, 200))
        assert (exact.int() - stretched.int()).abs().float().mean() < 3


def test_a_picture_decoded_at_half_its_size_keeps_its_crop():
    image = gradient(400, 600)[0]
    half = np.ascontiguousarray(image[::2, ::2])
    whole, smaller = Fit(48, 48, (300, 200, 200, 200))(image), Fit(48, 48, (300, 200, 200, 200))(half, (600, 400))
    assert (whole.int() - smaller.int()).abs().max() <= 2


def test_scaled_decoding_is_for_pictures_of_five_times_the_target_and_leaves_half_of_that():
    fit = Fit(480, 720)
    assert fit.least(3500, 2400) is None and fit.least(3600, 2300) is None
    assert fit.least(3600, 2400) == (1800, 1200)
    assert fit.least(4000, 3000) == (1800, 1350)
    assert Fit(480, 720, (0, 0, 1440, 960)).least(4000, 3000) is None  # it is the crop that counts
    assert Fit(480, 720, (0, 0, 9999, 960)).least(4000, 3000) is None


def test_results_do_not_share_memory():
    fit, one, other = Fit(32, 32), gradient(40, 90)[0], gradient(90, 40)[0]
    first = fit(one)
    kept = first.clone()
    fit(other)
    assert torch.equal(first, kept)
    square = gradient(32, 40)[0]
    first = fit(square)
    kept = first.clone()
    fit(gradient(32, 50)[0])
    assert torch.equal(first, kept)


def test_a_panorama_does_not_become_a_huge_intermediate_image():
    assert to_bucket(np.zeros((1, 4, 50_000, 3), np.uint8), 480, 720).shape == (1, 3, 480, 720)
