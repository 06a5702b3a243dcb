"""CogVideo's sampler for CogVideoX 1.5, where an evaluation samples what it evaluates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sat_ext.cogvideo.loss import condition
from sat_ext.cogvideo.parent import accepted, import_class
from sat_ext.config import reject_unknown_keys
from sat_ext.models.conditioning import padding_frames
from sat_ext.models.config import OFS

PARENT = "sgm.modules.diffusionmodules.sampling.VPSDEDPMPP2MSampler"
PARAMS = "model.sampler_config.params"
TEMPORAL_PATCH = 2  # latent frames in a patch of CogVideoX 1.5 (patch_size: [2, 2, 2])


class PaddedSampler:
    """A target for `model.sampler_config` of 1.5 models: the class `parent`, for any number of latent frames.

    CogVideo's evaluations (`log_video` in sat/diffusion_video.py of its main branch) sample as many latent frames
    as the batch has, which fails for an odd number, and pass no `ofs`, which fails for image-to-video models. Here
    both come as in training (`JointDiffusionLoss`): a frame of padding in front, dropped from the result, and
    2.0 as `ofs`. With an even number and an `ofs` given, as in sample_video.py, it does what the parent does.

    `parent` and its parameters stay in `params`. Raises `ConfigError` where the parent cannot be imported.
    """

    def __new__(cls, *, parent: str = PARENT, **params: Any) -> PaddedSampler:
        """An object of a class made here, over the parent's."""
        if cls is PaddedSampler:
            base = import_class(parent, f"{PARAMS}.parent", kind=object)
            cls = type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__doc__": cls.__doc__})
            reject_unknown_keys(params, accepted(cls), PARAMS)
        return super().__new__(cls)

    def __init__(self, *, parent: str = PARENT, **params: Any) -> None:
        super().__init__(**params)

    def __call__(
        self,
        denoiser: Any,
        x: Tensor,
        cond: dict[str, Tensor],
        uc: dict[str, Tensor] | None = None,
        *args: Any,
        ofs: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Latents (B, T, C, h, w) from noise `x` of that shape; `cond` and `uc` may hold the image as `concat`."""
        padding = padding_frames(x.shape[1], TEMPORAL_PATCH)
        if padding:
            x = torch.cat([torch.randn_like(x[:, :padding]), x], dim=1)
            cond, uc = _padded(cond, padding), _padded(uc, padding)
        if ofs is None:
            ofs = torch.full((1,), OFS, device=x.device)
        latents: Tensor = super().__call__(denoiser, x, cond, uc, *args, ofs=ofs, **kwargs)  # type: ignore[misc]
        return latents[:, padding:]


def _padded(cond: dict[str, Tensor] | None, padding: int) -> Any:
    if cond is None or "concat" not in cond:
        return cond
    none = torch.zeros(len(cond["concat"]), dtype=torch.bool)
    return {**cond, "concat": condition(cond["concat"], none, padding)}
