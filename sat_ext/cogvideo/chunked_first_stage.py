"""CogVideo's first stage, encoding one clip and a few frames at a time."""

from typing import Any

import torch
from torch import Tensor, nn

from sat_ext.cogvideo.chunked_encoder import Recompute, accept_statistics, encode_clip
from sat_ext.cogvideo.target import Target
from sat_ext.config import convert
from sat_ext.errors import ConfigError, DataError

PARAMS = "model.first_stage_config.params"
ENCODER = ("conv_in", "down", "mid", "norm_out", "conv_out", "temporal_compress_level")  # what chunks go through


class ChunkedFirstStage(Target, nn.Module):
    """A target for `model.first_stage_config`: the class `parent`, with an `encode` of low peak memory.

    docs/cogvideo.md has the options. The first chunk has a frame more than `frames`; `recompute: level` holds no
    activation of a clip at full resolution, "block" one.

    The latents are the parent's within rounding, and the posterior is sampled once for the whole batch, from the
    same random numbers. `decode` is the parent's. There is no gradient and no dropout in the encoder (0 in
    CogVideo's YAMLs), as the first stage never trains. Raises `ConfigError` for an encoder that is not built
    like `ContextParallelEncoder3D`."""

    PARENT = "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper"
    WHERE = PARAMS
    CALLS = ("encode",)
    # the parent's; Any, because they are built by names in a YAML
    encoder: Any
    regularization: Any

    def __init__(self, *, frames: int = 8, clips: int = 1, recompute: Recompute = "block", **params: Any) -> None:
        if params.get("cp_size", 0) > 1:
            raise ConfigError(
                f"{PARAMS}.cp_size: {params['cp_size']} splits a clip over GPUs, and chunks do not; set 1."
            )
        super().__init__(**params)
        if not all(hasattr(self.encoder, name) for name in ENCODER) or any(len(d.attn) for d in self.encoder.down):
            raise ConfigError(
                f"{PARAMS}.encoder_config: {type(self.encoder).__name__} of {params.get('parent', self.PARENT)} "
                "is not built like CogVideo's ContextParallelEncoder3D without attention; take the target "
                "sat_ext.cogvideo.ChunkedFirstStage out."
            )
        self.compression = step = 2**self.encoder.temporal_compress_level
        self.frames: int = convert(int, frames, f"{PARAMS}.frames")
        if self.frames < 1 or self.frames % step:
            raise ConfigError(
                f"{PARAMS}.frames: {frames} is not a multiple of {step}, the frames of one latent frame; use "
                f"{max(1, round(self.frames / step)) * step}."
            )
        self.clips: int = convert(int, clips, f"{PARAMS}.clips")
        if self.clips < 1:
            raise ConfigError(f"{PARAMS}.clips: {clips} is below 1; 1 encodes the batch sample by sample.")
        self.recompute: Recompute = convert(Recompute, recompute, f"{PARAMS}.recompute")
        accept_statistics(self.encoder)

    @torch.no_grad()
    def encode(
        self, x: Tensor, return_reg_log: bool = False, unregularized: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Any]]:
        """Unscaled latents (B, C, (T - 1) / 4 + 1, H / 8, W / 8) of pixels `x` (B, 3, T, H, W) in [-1, 1].

        `return_reg_log` adds the regularizer's log; `unregularized` returns the posterior's parameters. The
        parent's other arguments, for several GPUs, are ignored. Raises `DataError` unless T is 1 or 4k + 1."""
        if (x.shape[2] - 1) % self.compression:
            fit = (x.shape[2] - 1) // self.compression * self.compression + 1
            raise DataError(
                f"A clip of {x.shape[2]} frames cannot be encoded in chunks: the first becomes one latent frame "
                f"and each {self.compression} after it another; use {fit} or {fit + self.compression} frames."
            )
        chunks = [encode_clip(self.encoder, c, self.frames, self.recompute) for c in x.split(self.clips)]
        moments = torch.cat(chunks)
        if unregularized:
            return moments, {}
        latents, log = self.regularization(moments)
        return (latents, log) if return_reg_log else latents
