from __future__ import annotations

import torch

from sat_ext.models.conditioning import (
    condition_latents,
    drop_mask,
    noisy_first_frames,
    pad_front,
    padding_frames,
    stills,
)


def test_dropout_is_drawn_for_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([drop_mask(4, 0.25, generator) for _ in range(4000)])
    assert abs(masks.float().mean() - 0.25) < 0.01
    mixed = masks.any(dim=1) & ~masks.all(dim=1)
    assert mixed.float().mean() > 0.6  # 1 - 0.75^4 - 0.25^4 = 0.68; drawn per batch it would be 0
    assert not drop_mask(1000, 0.0, generator).any() and drop_mask(1000, 1.0, generator).all()


def test_condition_is_the_first_frame_then_zeros() -> None:
    first = torch.ones(3, 1, 4, 2, 2)
    condition = condition_latents(first, 3, torch.tensor([False, True, False]))
    assert condition.shape == (3, 3, 4, 2, 2)
    assert torch.equal(condition[[0, 2], :1], first[[0, 2]]) and not condition[:, 1:].any()
    assert not condition[1].any()


def test_dropping_a_condition_that_is_not_finite_leaves_zeros() -> None:
    first = torch.full((1, 1, 1, 1, 1), torch.nan)
    assert condition_latents(first, 2, torch.tensor([True])).eq(0).all()


def test_single_frames_count_as_stills_whatever_their_kind() -> None:
    assert stills(["image", "video"], 9).tolist() == [True, False]
    assert stills(["image", "video"], 1).tolist() == [True, True]


def test_condition_noise_has_cogvideos_level() -> None:
    pixels = torch.zeros(2000, 2, 1, 8, 8)
    noisy = noisy_first_frames(pixels, torch.Generator().manual_seed(0))
    assert noisy.shape == (2000, 1, 1, 8, 8)
    log_sigma = noisy.flatten(1).std(dim=1).log()
    assert abs(log_sigma.mean() + 3.0) < 0.05 and abs(log_sigma.std() - 0.5) < 0.05


def test_padding_fills_the_temporal_patch_with_first_frames() -> None:
    assert [padding_frames(n, 2) for n in (1, 2, 3, 4)] == [1, 0, 1, 0]
    assert padding_frames(3, None) == 0
    latents = torch.arange(3.0).reshape(1, 3, 1, 1, 1)
    assert pad_front(latents, 1).flatten().tolist() == [0, 0, 1, 2]
    assert pad_front(latents, 0) is latents
