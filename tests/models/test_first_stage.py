from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline

from sat_ext.demo_data import BACKGROUNDS, COLOURS
from sat_ext.errors import ConfigError
from sat_ext.models.first_stage import AutoencoderFirstStage, CosineFirstStage, build_first_stage
from sat_ext.models.folder import load_model_config
from tests.models.conftest import write_pretrained


def moving_circles(frames: int) -> torch.Tensor:
    """A circle of each demo colour that moves 3 pixels a frame, (12, frames, 3, 64, 64) in [-1, 1]."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    clips = []
    for background in BACKGROUNDS.values():
        for colour in COLOURS.values():
            shown = []
            for frame in range(frames):
                distance = ((rows - 30) ** 2 + (columns - 18 - 3 * frame) ** 2).sqrt()
                mask = (12.5 - distance).clamp(0, 1)[None]  # smooth edge
                front, back = (torch.tensor(c)[:, None, None] / 127.5 - 1 for c in (colour, background))
                shown.append(mask * front + (1 - mask) * back)
            clips.append(torch.stack(shown))
    return torch.stack(clips)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(4.0 / (a - b).square().mean().item())


@pytest.mark.parametrize("frames", [1, 9])
def test_cosine_roundtrip_is_recognisable(frames: int) -> None:
    pixels, stage = moving_circles(frames), CosineFirstStage()
    latents = stage.encode(pixels)
    assert latents.shape == (12, (frames - 1) // 4 + 1, 16, 8, 8)
    assert psnr(stage.decode(latents), pixels) > 25.0


def test_cosine_latents_have_about_unit_variance() -> None:
    latents = CosineFirstStage().encode(moving_circles(9))
    assert 0.8 < latents.square().mean().sqrt() < 1.3
    deviations = latents[:, 1:].transpose(1, 2).transpose(0, 1).flatten(1).std(dim=1)
    assert deviations.min() > 0.2 and deviations.max() < 4.0


def test_cosine_latents_within_the_kept_frequencies_come_back_exactly() -> None:
    stage, latents = CosineFirstStage(), torch.randn(2, 3, 16, 4, 4) * 0.05
    latents[:, 0, [1, 4, 5, 9, 13]] = 0  # a first frame has no motion
    torch.testing.assert_close(stage.encode(stage.decode(latents)), latents, rtol=0, atol=1e-5)


def test_a_still_has_the_latent_of_a_clips_first_frame() -> None:
    stage, pixels = CosineFirstStage(), moving_circles(9)
    torch.testing.assert_close(stage.encode(pixels[:, :1]), stage.encode(pixels)[:, :1])


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_autoencoder_shapes_and_scale(pretrained: Callable[..., Path], frames: int) -> None:
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"})
    stage = build_first_stage(config, torch.float32)
    assert isinstance(stage, AutoencoderFirstStage)
    pixels = torch.rand(1, frames, 3, 16, 32) * 2 - 1
    latents = stage.encode(pixels)
    assert latents.shape == (1, (frames - 1) // 4 + 1, 4, 2, 4)
    raw = stage.vae.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    torch.testing.assert_close(latents, raw * 0.7)
    assert stage.decode(latents).shape == pixels.shape


def test_autoencoder_draws_from_the_posterior_with_a_generator(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"})
    stage, pixels = build_first_stage(config, torch.float32), torch.rand(1, 1, 3, 16, 16)
    one, same, other = (stage.encode(pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(stage.encode(pixels), stage.encode(pixels))


def test_condition_scale_follows_invert_scale_latents(tmp_path: Path) -> None:
    folder = write_pretrained(tmp_path, "1.5-5b-i2v", invert_scale_latents=True)
    config = load_model_config({"pretrained": str(folder), "conditioning": "i2v"})
    stage, frame = build_first_stage(config, torch.float32), torch.rand(1, 1, 3, 16, 16)
    torch.testing.assert_close(stage.encode_condition(frame), stage.encode(frame) / 0.7**2)
    pipeline = SimpleNamespace(
        vae=stage.vae, vae_scaling_factor_image=0.7, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8,
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size_t=2)),
        scheduler=SimpleNamespace(init_noise_sigma=1.0),
    )  # fmt: skip
    _, theirs = CogVideoXImageToVideoPipeline.prepare_latents(
        pipeline, frame[:, 0], num_channels_latents=4, num_frames=5, height=16, width=16, dtype=torch.float32,
        device="cpu", generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    torch.testing.assert_close(theirs[:, :1], stage.encode_condition(frame, torch.Generator().manual_seed(1)))
    explicit = replace(config, first_stage=replace(config.first_stage, condition_scale=1.0))
    stage = build_first_stage(explicit, torch.float32)
    torch.testing.assert_close(stage.encode_condition(frame), stage.encode(frame) / 0.7)


@pytest.mark.parametrize("options", [{"condition_scale": 0.0}, {"kind": "cosine", "condition_scale": 1.0}])
def test_a_condition_scale_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"condition_scale: \d\.0 is not a scale of an autoencoder's latents"):
        load_model_config({"text": {"kind": "byt5"}, "first_stage": options})


def test_frozen_parts_stay_in_evaluation_mode(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"})
    stage = build_first_stage(config, torch.float32)
    assert not stage.train().training and not any(p.requires_grad for p in stage.parameters())


def autoencoder(pretrained: Callable[..., Path], **levers: object) -> AutoencoderFirstStage:
    config = load_model_config(
        {"pretrained": str(pretrained()), "conditioning": "i2v", "first_stage": {"kind": "autoencoder", **levers}}
    )
    stage = build_first_stage(config, torch.float32)
    assert isinstance(stage, AutoencoderFirstStage)
    return stage


def shapes_seen(module: torch.nn.Module) -> list[torch.Size]:
    """Of the inputs of `module`, from now on."""
    seen: list[torch.Size] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    return seen


def test_slicing_encodes_one_sample_at_a_time_and_draws_alike(pretrained: Callable[..., Path]) -> None:
    plain, sliced = autoencoder(pretrained), autoencoder(pretrained, slicing=True)
    seen, pixels = shapes_seen(sliced.vae.encoder), torch.rand(3, 5, 3, 16, 16)
    expected, found = (s.encode(pixels, torch.Generator().manual_seed(1)) for s in (plain, sliced))
    torch.testing.assert_close(found, expected)
    assert [shape[0] for shape in seen] == [1, 1, 1]


@pytest.mark.parametrize(("frames", "chunks"), [(4, [5, 4, 4, 4]), (8, [9, 8]), (16, [17])])
def test_clips_are_encoded_so_many_frames_at_a_time(
    pretrained: Callable[..., Path], frames: int, chunks: list[int]
) -> None:
    stage = autoencoder(pretrained, frames=frames)
    seen = shapes_seen(stage.vae.encoder)
    assert stage.encode(torch.rand(1, 17, 3, 16, 16)).shape[1] == 5
    assert [shape[2] for shape in seen] == chunks


def test_samples_are_decoded_in_tiles_and_training_encodes_as_the_yaml_says(
    pretrained: Callable[..., Path],
) -> None:
    stage = autoencoder(pretrained)
    # diffusers' overlaps are a sixth and a fifth of a tile, in whole latent pixels
    stage.vae.tile_sample_min_height, stage.vae.tile_sample_min_width = 48, 40
    stage.vae.tile_latent_min_height, stage.vae.tile_latent_min_width = 6, 5
    decoded, encoded = shapes_seen(stage.vae.decoder), shapes_seen(stage.vae.encoder)
    pixels = stage.decode(torch.randn(1, 3, 4, 12, 10))
    assert pixels.shape == (1, 9, 3, 96, 80) and max(shape[-2:] for shape in decoded) == (6, 5)
    stage.encode(pixels)
    assert {shape[-2:] for shape in encoded} == {(96, 80)}
