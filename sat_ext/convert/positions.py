"""Position embeddings that CogVideo keeps in its checkpoints and diffusers computes.

With them a file of SAT's can be made from a folder of diffusers', and a file's own compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_ext.cogvideox import THETA, latent_frames

UNUSED = "transformer.position_embeddings.weight"
UNUSED_LENGTH = 64  # `max_sequence_length` of every YAML of CogVideo's


def computed(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that SAT's transformer has beyond diffusers', by SAT's names, for a model of this config.json.

    Rotary models carry SAT's own position embedding too, which their network never reads; it is zero here.
    """
    if not config["use_rotary_positional_embeddings"]:
        return {"mixins.pos_embed.pos_embedding": sinusoidal(config).to(dtype)}
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    tensors = {UNUSED: torch.zeros(UNUSED_LENGTH, hidden, dtype=dtype)}
    if config["patch_size_t"] is None:  # 1.5 computes them anew
        sines, cosines = rotary(config)
        tensors["mixins.pos_embed.freqs_sin"] = sines.to(dtype)
        tensors["mixins.pos_embed.freqs_cos"] = cosines.to(dtype)
    return tensors


def grid(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """The latent frames, and the rows and columns of patches, of the size that the model is for."""
    patch = config["patch_size"]
    frames = latent_frames(config["sample_frames"])
    return frames, config["sample_height"] // patch, config["sample_width"] // patch


def rotary(config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Sines and cosines, each (frames * rows * columns, head dimension), float32.

    A quarter of the dimensions turns with the frame, three eighths each with the row and the column; two
    neighbours turn alike (`Rotary3DPositionEmbeddingMixin` in sat/dit_video_concat.py).
    """
    head = config["attention_head_dim"]
    sizes = grid(config)
    angles = []
    for axis, (size, dim) in enumerate(zip(sizes, (head // 4, head // 8 * 3, head // 8 * 3), strict=True)):
        speeds = 1.0 / THETA ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim)
        turned = torch.outer(torch.arange(size, dtype=torch.float32), speeds).repeat_interleave(2, dim=-1)
        shape = [1, 1, 1, turned.shape[1]]
        shape[axis] = size
        angles.append(turned.reshape(shape).expand(*sizes, turned.shape[1]))
    flat = torch.cat(angles, dim=-1).flatten(0, 2)
    return flat.sin(), flat.cos()


def sinusoidal(config: Mapping[str, Any]) -> Tensor:
    """The embedding of CogVideoX-2B, (1, text + frames * rows * columns, hidden), float32, zero for the text.

    A quarter of the dimensions tells the frame, three eighths each the column and the row, whose distances are
    shortened by `spatial_interpolation_scale` (`Basic3DPositionEmbeddingMixin` in sat/dit_video_concat.py).
    """
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    sizes = frames, rows, columns = grid(config)
    scale = config["spatial_interpolation_scale"]
    parts = [
        np.broadcast_to(
            _waves(np.arange(frames, dtype=np.float32), hidden // 4)[:, None, None], (*sizes, hidden // 4)
        )
    ]
    spatial = hidden // 4 * 3 // 2
    across = _waves(np.arange(columns, dtype=np.float32) / np.float32(scale), spatial)
    down = _waves(np.arange(rows, dtype=np.float32) / np.float32(scale), spatial)
    parts += [
        np.broadcast_to(across[None, None], (*sizes, spatial)),
        np.broadcast_to(down[None, :, None], (*sizes, spatial)),
    ]
    video = torch.from_numpy(np.concatenate(parts, axis=-1)).float().flatten(0, 2)
    return torch.cat([torch.zeros(config["max_text_seq_length"], hidden), video])[None]


def _waves(positions: np.ndarray, dim: int) -> np.ndarray:
    """Sines, then cosines, of `positions` at dim / 2 frequencies: (positions, dim), float64."""
    frequencies = 1.0 / THETA ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
