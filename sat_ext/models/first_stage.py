"""The first stage, which never trains: pixels to latents and back, all (B, T, C, H, W).

Pixels are in [-1, 1] with T = 1 or 4k+1. The first latent frame holds one pixel frame, each other four."""

import math
from dataclasses import asdict
from functools import cache

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from sat_ext.cogvideox import LATENT_SIDE, TEMPORAL_COMPRESSION, pixel_frames
from sat_ext.models.config import ModelConfig

# Coefficients that the cosine first stage keeps, as (temporal, vertical, horizontal) frequency, and what each is
# divided by: 1.5 times the square root of its standard deviation, measured once on coloured shapes of some 25
# pixels that move 3 pixels a frame, and rounded. They are the ones with the most energy there. The square root
# leaves more to the low frequencies, which the eye sees first, and keeps the whole at about unit variance.
LUMA = (
    ((0, 0, 0), 7.0),
    ((1, 0, 0), 2.0),
    ((0, 1, 0), 1.9),
    ((0, 0, 1), 1.9),
    ((1, 1, 0), 1.4),
    ((1, 0, 1), 1.4),
    ((0, 2, 0), 1.1),
    ((0, 0, 2), 1.1),
)
CHROMA = (((0, 0, 0), 3.0), ((1, 0, 0), 1.7), ((0, 1, 0), 1.5), ((0, 0, 1), 1.5))

# Rows are orthonormal: brightness, red against blue, green against both.
OPPONENT_COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


class CosineFirstStage(nn.Module):
    """A fixed, orthonormal, truncated space-time cosine transform: the tiny models' first stage, without weights.

    Blocks of 8x8 pixels and, after the first frame, groups of four frames become 16 channels, together of about
    unit variance. The first frame counts as four equal ones, so that a channel means the same in a still, in a
    first frame and in a clip."""

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents, in the pixels' dtype. Nothing is drawn."""
        colours, basis, scale = _cosine_basis(pixels.device)
        group, block = TEMPORAL_COMPRESSION, LATENT_SIDE
        padded = torch.cat([pixels[:, :1].expand(-1, group - 1, -1, -1, -1), pixels], dim=1).float()
        batch, frames, _, height, width = padded.shape
        blocks = torch.einsum("dc,btchw->btdhw", colours, padded).reshape(
            batch, frames // group, group, 3, height // block, block, width // block, block
        )
        latents = torch.einsum("ndtpq,bgtdhpwq->bgnhw", basis, blocks)
        return (latents / scale[:, None, None]).to(pixels.dtype)

    def moments(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Latents, and no deviation."""
        return self.encode(pixels), None

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped to [-1, 1]."""
        colours, basis, scale = _cosine_basis(latents.device)
        blocks = torch.einsum("ndtpq,bgnhw->bgtdhpwq", basis, latents.float() * scale[:, None, None])
        batch, groups, group, _, rows, block, columns, _ = blocks.shape
        frames = blocks.reshape(batch, groups * group, 3, rows * block, columns * block)
        pixels = torch.einsum("dc,btdhw->btchw", colours, frames)[:, group - 1 :]
        return pixels.clamp(-1.0, 1.0).to(latents.dtype)

    def encode_condition(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latent of an I2V condition frame, encoded alone; `frames` has T = 1."""
        return self.encode(frames, generator)


@cache
def _cosine_basis(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Colour rows (3, 3), one orthonormal (3, 4, 8, 8) pattern a channel, and the channels' scales."""
    time = _cosine_rows(TEMPORAL_COMPRESSION)
    space = _cosine_rows(LATENT_SIDE)
    patterns, scales = [], []
    for colour, kept in enumerate((LUMA, CHROMA, CHROMA)):
        for (k, u, v), deviation in kept:
            pattern = torch.zeros(3, TEMPORAL_COMPRESSION, LATENT_SIDE, LATENT_SIDE)
            pattern[colour] = time[k][:, None, None] * space[u][None, :, None] * space[v][None, None, :]
            patterns.append(pattern)
            scales.append(deviation)
    colours = torch.nn.functional.normalize(torch.tensor(OPPONENT_COLOURS), dim=1)
    return colours.to(device), torch.stack(patterns).to(device), torch.tensor(scales).to(device)


def _cosine_rows(size: int) -> Tensor:
    """The orthonormal DCT-II of `size` samples, one frequency a row."""
    frequency, sample = torch.arange(size)[:, None], torch.arange(size)[None, :]
    rows = torch.cos(math.pi * (sample + 0.5) * frequency / size) * math.sqrt(2.0 / size)
    rows[0] /= math.sqrt(2.0)
    return rows


class AutoencoderFirstStage(nn.Module):
    """CogVideoX's video autoencoder, with latents scaled as the transformer was trained on them."""

    def __init__(self, vae: AutoencoderKLCogVideoX, condition_scale: float | None) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.scale = float(dict(vae.config)["scaling_factor"])
        # CogVideoX-1.5's I2V model was trained on condition latents of another scale. Its vae/config.json says so
        # with `invert_scale_latents`, which diffusers' pipeline reads as the factor's inverse.
        inverted = bool(dict(vae.config).get("invert_scale_latents", False))
        default = 1.0 / self.scale if inverted else self.scale
        self.condition_scale = default if condition_scale is None else condition_scale

    def train(self, mode: bool = True) -> "AutoencoderFirstStage":
        """Stay in evaluation mode."""
        return super().train(False)

    def _posterior(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        return self.vae.encode(pixels.transpose(1, 2).to(self.vae.dtype)).latent_dist

    def _latents(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        posterior = self._posterior(pixels)
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents.transpose(1, 2)

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents: a sample of the posterior with a generator, its mode without."""
        return self._latents(pixels, generator) * self.scale

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, scaled as latents are."""
        posterior = self._posterior(pixels)
        return posterior.mean.transpose(1, 2) * self.scale, posterior.std.transpose(1, 2) * self.scale

    @torch.no_grad()
    def encode_condition(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The latent of an I2V condition frame, encoded alone; `frames` has T = 1."""
        return self._latents(frames, generator) * self.condition_scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped to [-1, 1]."""
        frames = pixel_frames(latents.shape[1])
        if latents.shape[1] % 2 == 0:
            # The decoder takes the first frame apart only in an odd number of them: 2 would become 8 pixel
            # frames, not 5. It is causal, so one more at the end changes nothing before it.
            latents = torch.cat([latents, latents[:, -1:]], dim=1)
        levers = self.vae.use_tiling, self.vae.use_slicing
        # decoded whole, a clip takes several times the memory of a training step
        self.vae.use_tiling = self.vae.use_slicing = True
        decoded = self.vae.decode((latents / self.scale).transpose(1, 2).to(self.vae.dtype)).sample
        self.vae.use_tiling, self.vae.use_slicing = levers
        return decoded.transpose(1, 2)[:, :frames].clamp(-1.0, 1.0)


FirstStage = CosineFirstStage | AutoencoderFirstStage


def build_first_stage(config: ModelConfig, dtype: torch.dtype) -> FirstStage:
    """The first stage that `config` asks for, with the weights of the pretrained folder or random ones."""
    first = config.first_stage
    if first.kind == "cosine":
        return CosineFirstStage()
    if config.pretrained is not None:
        vae = AutoencoderKLCogVideoX.from_pretrained(
            config.pretrained, subfolder="vae", torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    else:
        levels = len(first.autoencoder.block_out_channels)
        vae = AutoencoderKLCogVideoX(
            **asdict(first.autoencoder),
            down_block_types=("CogVideoXDownBlock3D",) * levels,
            up_block_types=("CogVideoXUpBlock3D",) * levels,
        )
    vae.use_tiling, vae.use_slicing = first.tiling, first.slicing
    vae.num_sample_frames_batch_size = first.frames
    return AutoencoderFirstStage(vae, first.condition_scale)
