"""Pixels as models see them: uint8 to [-1, 1] and back."""

import numpy as np
import torch
from torch import Tensor


def to_model_range(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels (..., C, H, W) as [-1, 1] in `dtype`, on their device; floating point pixels only change dtype.

    Frame by frame: the float32 copy, needed for exact rounding to `dtype`, then stays small, and in the cache."""
    if pixels.dtype != torch.uint8:
        return pixels.to(dtype)
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    for row, frame in zip(out.flatten(0, -4), pixels.flatten(0, -4), strict=True):
        row.copy_(frame.to(torch.float32).div_(127.5).sub_(1))
    return out


def to_uint8(clip: Tensor) -> np.ndarray:
    """(T, C, H, W), uint8 or in [-1, 1], to uint8 (T, H, W, C)."""
    if clip.dtype != torch.uint8:
        clip = ((clip.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return clip.permute(0, 2, 3, 1).cpu().numpy()
