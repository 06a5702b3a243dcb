"""What the transformer sees beside noisy latents (B, T, C, H, W): the I2V condition, dropout, 1.5's padding."""

import torch
from torch import Tensor

# Noise on the condition frame in training, so that the model does not copy its grain: its deviation is
# exp(N(mean, std)) on pixels in [-1, 1]. Source: `add_noise_to_first_frame` in CogVideo's sat/diffusion_video.py.
CONDITION_NOISE_MEAN = -3.0
CONDITION_NOISE_STD = 0.5


def noisy_first_frames(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The first frame of each clip, (B, 1, C, H, W), with noise of a level drawn per sample."""
    first = pixels[:, :1].float()
    level = torch.randn(len(first), 1, 1, 1, 1, generator=generator, device=generator.device)
    sigma = torch.exp(CONDITION_NOISE_MEAN + CONDITION_NOISE_STD * level).to(first.device)
    noise = torch.randn(first.shape, generator=generator, device=generator.device).to(first.device)
    return (first + sigma * noise).to(pixels.dtype)


def drop_mask(count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Whether each of `count` samples is dropped, drawn for each: (count,) bool."""
    return torch.rand(count, generator=generator, device=generator.device) < rate


def stills(kinds: list[str], frames: int) -> Tensor:
    """Which samples show a single frame: (B,) bool. An I2V model must never see their condition frame, as it is
    their target (the leak)."""
    return torch.tensor([kind == "image" or frames == 1 for kind in kinds])


def condition_latents(first: Tensor, frames: int, dropped: Tensor) -> Tensor:
    """The I2V condition for `frames` latent frames: the first frame's latent (B, 1, C, H, W), then zeros.

    The first frame is in front even of the padding, as in diffusers' pipeline. Where `dropped` (B,) is true the
    whole condition is zero, as in CogVideo."""
    # not a product with the mask: a latent that is not finite must become zero, too
    kept = torch.where(dropped.to(first.device)[:, None, None, None, None], torch.zeros_like(first), first)
    rest = kept.new_zeros(kept.shape[0], frames - 1, *kept.shape[2:])
    return torch.cat([kept, rest], dim=1)


def padding_frames(frames: int, patch_size_t: int | None) -> int:
    """Latent frames to put in front so that `frames` divides by the transformer's temporal patch.

    >>> padding_frames(1, 2), padding_frames(13, 2), padding_frames(22, 2), padding_frames(13, None)
    (1, 1, 0, 0)
    """
    return 0 if patch_size_t is None else -frames % patch_size_t


def pad_front(latents: Tensor, padding: int) -> Tensor:
    """`latents` with `padding` copies of the first frame before it.

    diffusers' 1.5 pipelines expect the padding there, and CogVideo's diffusers trainers put the copies there
    (finetune/models/cogvideox1_5_i2v/lora_trainer.py)."""
    return torch.cat([latents[:, :1].expand(-1, padding, -1, -1, -1), latents], dim=1) if padding else latents


def pad_condition(condition: Tensor, padding: int) -> Tensor:
    """CogVideo's I2V condition with `padding` copies of its last frame behind it.

    The first frame stays the first of all, in the padding's place, as in diffusers' pipeline. The last is zero in
    the published models, and the image again where CogVideo repeats it (`noised_image_all_concat`)."""
    last = condition[:, -1:].expand(-1, padding, -1, -1, -1)
    return torch.cat([condition, last], dim=1) if padding else condition
