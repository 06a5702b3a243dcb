"""The noise schedule and the loss: what the transformer is asked to predict, and at which noise levels.

CogVideoX trains v-prediction with uniform timesteps on a schedule of zero terminal signal-to-noise ratio."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sat_ext.errors import ConfigError
from sat_ext.models.config import ABSENT, ScheduleConfig

TIMESTEPS = 1000
EVALUATED_TIMESTEPS = 4  # noise levels at which an evaluation looks at each sample

# `ZeroSNRDDPMDiscretization` in CogVideo's sat/sgm/modules/diffusionmodules/discretizer.py, as the published
# scheduler_config.json files say it. Beside these they have `snr_shift_scale`, which is 3.0 for 2B, else 1.0.
SCHEDULER_CONSTANTS: dict[str, Any] = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


def diffusers_scheduler(schedule: ScheduleConfig) -> Any:
    """diffusers' CogVideoX scheduler, set as the published scheduler_config.json files are."""
    # here, as CogVideo's loss imports this module where diffusers need not import
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    return {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[schedule.sampler](
        **SCHEDULER_CONSTANTS, snr_shift_scale=schedule.snr_shift_scale, clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing",
    )  # fmt: skip


class NoiseSchedule:
    """Noise levels of a model, from the signal's share of the variance at each of the 1000 timesteps (float64).

    Not diffusers' own methods: they round these shares to the latents' dtype before they take the root."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.root_signal = alphas_cumprod.sqrt().float()
        self.root_noise = (1.0 - alphas_cumprod).sqrt().float()

    def _at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        signal, noise = (v.to(like.device)[timesteps] for v in (self.root_signal, self.root_noise))
        return signal.reshape(shape), noise.reshape(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at their noise levels, float32. All of `latents`' shape (B, ...); `timesteps` is (B,)."""
        root_signal, root_noise = self._at(timesteps, latents)
        return root_signal * latents.float() + root_noise * noise.float()

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the transformer predicts, float32."""
        root_signal, root_noise = self._at(timesteps, latents)
        return root_signal * noise.float() - root_noise * latents.float()


def velocity_losses(prediction: Tensor, target: Tensor, padding: int = 0) -> Tensor:
    """The loss of each sample, (B,) float32, without the first `padding` latent frames of (B, T, C, H, W).

    The squared error of the velocity is SAT's loss, the squared error of the denoised latents weighted by
    1 / (1 - alpha), because the two errors differ by the factor sqrt(1 - alpha); this way nothing is divided."""
    error = prediction.float() - target
    return error[:, padding:].square().flatten(1).mean(dim=1)


def mean_where(losses: Tensor, chosen: Sequence[bool]) -> Tensor:
    """The mean of the chosen losses, or SAT's mark if there are none.

    >>> mean_where(torch.tensor([1.0, 2.0, 6.0]), [False, True, True])
    tensor(4.)
    """
    places = [i for i, is_chosen in enumerate(chosen) if is_chosen]  # a mask on the GPU would make the CPU wait
    return losses[places].float().mean() if places else losses.new_full((), ABSENT, dtype=torch.float32)


def sample_seeds(batch: Mapping[str, Any]) -> list[int]:
    """For each sample of a batch the seed of its draws in an evaluation, from its source and key alone."""
    names = zip(batch["source"], batch["key"], strict=True)
    return [zlib.crc32(f"{source}/{key}".encode()) for source, key in names]


def stratified_timesteps(offsets: Tensor, strata: int) -> Tensor:
    """For each of B offsets in [0, 1), `strata` timesteps, one from each equal part: (strata, B) int64.

    >>> stratified_timesteps(torch.tensor([0.0, 0.5]), 4)
    tensor([[  0, 125],
            [250, 375],
            [500, 625],
            [750, 875]])
    """
    parts = torch.arange(strata, device=offsets.device)[:, None] + offsets[None, :]
    return (parts * (TIMESTEPS / strata)).long().clamp(max=TIMESTEPS - 1)


def read_schedule(scheduler: dict[str, Any], where: str) -> ScheduleConfig:
    """The schedule that a folder's scheduler_config.json describes. Raises `ConfigError` if it is not CogVideoX's:
    training on another schedule would spoil the weights."""
    for key, expected in SCHEDULER_CONSTANTS.items():
        if scheduler.get(key, expected) != expected:
            raise ConfigError(
                f"{where}: {key} is {scheduler[key]!r}, but CogVideoX models train with {expected!r}; "
                "take the scheduler/ of the published model."
            )
    name = str(scheduler.get("_class_name", ""))
    return ScheduleConfig(
        snr_shift_scale=float(scheduler.get("snr_shift_scale", 3.0)),  # diffusers' own default
        sampler="dpm" if "DPM" in name else "ddim",
    )
