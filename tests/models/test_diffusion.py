from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

from sat_ext.errors import ConfigError
from sat_ext.models.config import ScheduleConfig
from sat_ext.models.diffusion import (
    NoiseSchedule,
    diffusers_scheduler,
    read_schedule,
    stratified_timesteps,
    velocity_losses,
)


def alphas_cumprod(shift: float) -> torch.Tensor:
    """CogVideoX's (`ZeroSNRDDPMDiscretization`): betas are linear in their root, log SNR is moved down by
    log(shift), and the roots are moved and stretched so that the last is 0 and the first stays."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1.0 - betas, dim=0)
    root = (signal / (shift + (1.0 - shift) * signal)).sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_schedule_is_cogvideos(shift: float, sampler: str) -> None:
    scheduler = diffusers_scheduler(ScheduleConfig(snr_shift_scale=shift, sampler=sampler))
    torch.testing.assert_close(scheduler.alphas_cumprod, alphas_cumprod(shift), rtol=0, atol=1e-12)


def test_last_timestep_has_no_signal() -> None:
    schedule = NoiseSchedule(diffusers_scheduler(ScheduleConfig(snr_shift_scale=3.0)).alphas_cumprod)
    assert schedule.root_signal[-1] == 0.0 and schedule.root_noise[-1] == 1.0


def test_noise_and_velocity_equal_diffusers() -> None:
    scheduler = diffusers_scheduler(ScheduleConfig(snr_shift_scale=3.0))
    schedule = NoiseSchedule(scheduler.alphas_cumprod)
    latents, noise = torch.randn(3, 2, 4, 2, 2), torch.randn(3, 2, 4, 2, 2)
    timesteps = torch.tensor([0, 400, 999])
    expected = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), expected)
    expected = scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.velocity(latents, noise, timesteps), expected)


def test_loss_is_sats_weighted_denoising_loss() -> None:
    """SAT's estimate of the latents is root_signal * noisy - root_noise * prediction, and its loss is the
    squared error of that over 1 - alpha."""
    schedule = NoiseSchedule(torch.full((1000,), 0.36, dtype=torch.float64))
    latents, noise, timesteps = torch.full((1, 1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1, 1), torch.tensor([5])
    noisy = schedule.add_noise(latents, noise, timesteps)
    assert noisy.item() == pytest.approx(0.6 * 2.0 + 0.8 * 1.0)  # 2.0
    prediction = torch.full((1, 1, 1, 1, 1), 0.5)
    estimate = 0.6 * 2.0 - 0.8 * 0.5  # 0.8
    by_hand = (estimate - 2.0) ** 2 / (1 - 0.36)  # 1.44 / 0.64
    loss = velocity_losses(prediction, schedule.velocity(latents, noise, timesteps))
    assert loss.item() == pytest.approx(by_hand) == pytest.approx(2.25)


@pytest.mark.parametrize("timestep", [0, 500, 998])
def test_loss_equals_sats_formula_at_real_noise_levels(timestep: int) -> None:
    torch.manual_seed(0)
    schedule, alpha = NoiseSchedule(alphas_cumprod(1.0)), alphas_cumprod(1.0)[timestep]
    latents, noise, prediction = torch.randn(3, 2, 4, 4, 2, 2).double().unbind(0)
    timesteps = torch.full((2,), timestep)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    estimate = alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction
    expected = ((estimate - latents) ** 2 / (1 - alpha)).flatten(1).mean(1)
    found = velocity_losses(prediction, schedule.velocity(latents, noise, timesteps))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_padding_counts_nothing() -> None:
    schedule = NoiseSchedule(alphas_cumprod(1.0))
    latents, noise, prediction = torch.randn(3, 1, 2, 4, 2, 2).unbind(0)
    timesteps = torch.tensor([300])
    padded = velocity_losses(prediction, schedule.velocity(latents, noise, timesteps), padding=1)
    alone = velocity_losses(prediction[:, 1:], schedule.velocity(latents, noise, timesteps)[:, 1:])
    assert torch.equal(padded, alone)


def test_training_timesteps_are_uniform_over_all_thousand() -> None:
    (drawn,) = stratified_timesteps(torch.rand(50_000, generator=torch.Generator().manual_seed(0)), 1)
    assert (drawn.min(), drawn.max()) == (0, 999)
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    assert (counts / 5000 - 1).abs().max() < 0.05


def test_stratified_timesteps_take_one_of_each_part() -> None:
    offsets = torch.rand(7, generator=torch.Generator().manual_seed(0))
    drawn = stratified_timesteps(offsets, 4)
    assert torch.equal(drawn // 250, torch.arange(4)[:, None].expand(4, 7))
    assert stratified_timesteps(torch.tensor([1.0 - 1e-8]), 1).item() == 999


def test_schedule_of_a_folder_is_read() -> None:
    published = dict(CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True).config)
    assert read_schedule(published, "f") == ScheduleConfig(snr_shift_scale=3.0, sampler="ddim")
    dpm = {**published, "_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0}
    assert read_schedule(dpm, "f") == ScheduleConfig(snr_shift_scale=1.0, sampler="dpm")
    with pytest.raises(ConfigError, match=r"f: prediction_type is 'epsilon', but .* with 'v_prediction'"):
        read_schedule({**published, "prediction_type": "epsilon"}, "f")
