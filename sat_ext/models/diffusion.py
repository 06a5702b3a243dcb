"""The noise schedule and the loss: what the transformer is asked to predict, and at which noise levels.

CogVideoX trains v-prediction with uniform timesteps on a schedule of zero terminal signal-to-noise ratio.
Source of the constants: `ZeroSNRDDPMDiscretization` (linear_start, linear_end, num_timesteps, shift_scale) in
CogVideo's sat/sgm/modules/diffusionmodules/discretizer.py, and the scheduler that its
tools/convert_weight_sat2hf.py writes beside the published weights.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_ext.errors import ConfigError
from sat_ext.models.config import ABSENT, ScheduleConfig

TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
EVALUATED_TIMESTEPS = 4  # noise levels at which an evaluation looks at each sample

# What the published scheduler_config.json files say beside `snr_shift_scale`, which is 3.0 for 2B, else 1.0.
SCHEDULER_CONSTANTS: dict[str, Any] = {
    "num_train_timesteps": TIMESTEPS,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


def alphas_cumprod(snr_shift_scale: float) -> Tensor:
    """The signal's share of the variance at each of the 1000 timesteps, float64, falling to exactly 0.

    Betas are linear in their square root. The shift moves log SNR down by log(snr_shift_scale); then the
    square roots are moved and stretched so that the last is 0 and the first stays.
    """
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    signal = torch.cumprod(1.0 - betas, dim=0)
    signal = signal / (snr_shift_scale + (1.0 - snr_shift_scale) * signal)
    root = signal.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return root**2


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels of a model. `root_signal` and `root_noise` are (1000,) float32 and on the CPU."""

    snr_shift_scale: float
    root_signal: Tensor
    root_noise: Tensor

    @staticmethod
    def make(snr_shift_scale: float) -> "NoiseSchedule":
        """CogVideoX's schedule; `snr_shift_scale` is 3.0 for 2B and 1.0 for the other published models."""
        signal = alphas_cumprod(snr_shift_scale)
        return NoiseSchedule(snr_shift_scale, signal.sqrt().float(), (1.0 - signal).sqrt().float())

    def _at(self, values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
        return values.to(like.device)[timesteps].reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents at their noise levels, float32. All of `latents`' shape (B, ...); `timesteps` is (B,)."""
        signal = self._at(self.root_signal, timesteps, latents)
        return signal * latents.float() + self._at(self.root_noise, timesteps, latents) * noise.float()

    def velocity(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the transformer predicts: sqrt(alpha) noise - sqrt(1 - alpha) latents, float32."""
        signal = self._at(self.root_signal, timesteps, latents)
        return signal * noise.float() - self._at(self.root_noise, timesteps, latents) * latents.float()

    def losses(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, padding: int = 0
    ) -> Tensor:
        """The loss of each sample, (B,) float32.

        All tensors are (B, T, C, H, W). The squared error of the velocity is SAT's loss, the squared error of
        the denoised latents weighted by 1 / (1 - alpha), because the two errors differ by the factor
        sqrt(1 - alpha); written this way nothing is divided. The first `padding` latent frames count nothing.
        """
        error = prediction.float() - self.velocity(latents, noise, timesteps)
        return error[:, padding:].square().flatten(1).mean(dim=1)


def mean_where(losses: Tensor, chosen: Sequence[bool]) -> Tensor:
    """The mean of the chosen losses, or SAT's mark where there are none. A list, so that no GPU waits.

    >>> mean_where(torch.tensor([1.0, 2.0, 6.0]), [False, True, True])
    tensor(4.)
    """
    places = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    return losses[places].float().mean() if places else losses.new_full((), ABSENT, dtype=torch.float32)


def timestep_interval(rank: int, world: int) -> tuple[int, int]:
    """The timesteps [low, high) that a rank draws from: the ranks share out the range, so that a step covers it.

    As CogVideo's configurations have it (`uniform_sampling: True` of `DiscreteSampling`, in
    sat/sgm/modules/diffusionmodules/sigma_sampling.py at tag v1.0): the parts are equal, and where the number of
    ranks does not divide the range, neighbours draw from the same part.

    >>> [timestep_interval(rank, 4) for rank in range(4)]
    [(0, 250), (250, 500), (500, 750), (750, 1000)]
    >>> timestep_interval(2, 3)
    (0, 1000)
    """
    parts = next(n for n in range(world, 0, -1) if world % n == 0 and TIMESTEPS % n == 0)
    part, width = rank // (world // parts), TIMESTEPS // parts
    return part * width, (part + 1) * width


def uniform_timesteps(
    count: int, generator: torch.Generator, interval: tuple[int, int] = (0, TIMESTEPS)
) -> Tensor:
    """`count` independent timesteps for training, (count,) int64, on the generator's device."""
    return torch.randint(*interval, (count,), generator=generator, device=generator.device)


def sample_seeds(batch: Mapping[str, Any]) -> list[int]:
    """For each sample of a batch a number of its source and key alone, which an evaluation draws from."""
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
    """The schedule that a folder's scheduler_config.json describes.

    Raises `ConfigError` where it is not CogVideoX's: training on another schedule would spoil the weights.
    """
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
