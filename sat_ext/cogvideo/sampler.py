"""CogVideo's sampler for CogVideoX 1.5, where an evaluation samples what it evaluates."""

from typing import Any

import torch
from torch import Tensor

from sat_ext.cogvideo.loss import condition_factor, scaled
from sat_ext.cogvideo.target import Target
from sat_ext.cogvideox import OFS, PATCH, SCALE_FACTOR
from sat_ext.models.conditioning import pad_condition, padding_frames

PARAMS = "model.sampler_config.params"


class PaddedSampler(Target):
    """A target for `model.sampler_config` of 1.5 models: the class `parent`, for any number of latent frames.

    CogVideo's evaluations (`log_video` in sat/diffusion_video.py of its main branch) sample as many latent frames
    as the batch has, which fails for an odd number, and pass no `ofs`, which fails for image-to-video models. Here
    both are as in training (`JointDiffusionLoss`), and so is the scale of the condition.

    The engine drops the first frame that it decodes, as padding (`decode_first_stage`). So the padding stays in
    the result, and where none was needed a copy of the first frame goes in front. With an `ofs` given, as by
    sample_video.py for image-to-video models, the parent samples alone: that script pads by itself."""

    PARENT = "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler"
    WHERE = PARAMS

    def __init__(
        self, *, condition_scale: float | None = None, scale_factor: float = SCALE_FACTOR, **params: Any
    ) -> None:
        super().__init__(**params)
        self.condition_factor = condition_factor(condition_scale, scale_factor, PARAMS)

    def __call__(
        self, denoiser: Any, x: Tensor, cond: dict[str, Tensor], uc: dict[str, Tensor] | None = None, *args: Any,
        ofs: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Latents from noise `x` (B, T, C, h, w), with one frame more than T, in front, unless `ofs` is given.

        `cond` and `uc` may hold the image as `concat`."""
        sample: Any = super().__call__  # type: ignore[misc]
        if ofs is not None:
            return sample(denoiser, x, cond, uc, *args, ofs=ofs, **kwargs)
        padding = padding_frames(x.shape[1], PATCH)
        x = torch.cat([torch.randn_like(x[:, :padding]), x], dim=1)
        cond, uc = (self._as_trained(c, padding) for c in (cond, uc))
        ofs = torch.full((1,), OFS, device=x.device)
        latents: Tensor = sample(denoiser, x, cond, uc, *args, ofs=ofs, **kwargs)
        return latents if padding else torch.cat([latents[:, :1], latents], dim=1)

    def _as_trained(self, cond: dict[str, Tensor] | None, padding: int) -> Any:
        if cond is None or "concat" not in cond:
            return cond
        return {**cond, "concat": pad_condition(scaled(cond["concat"], self.condition_factor), padding)}
