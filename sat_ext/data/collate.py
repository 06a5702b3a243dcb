"""Samples of one bucket to the batch that SAT and the engine take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from sat_ext.pixels import to_model_range
from sat_ext.types import Sample


def collate(samples: Sequence[Sample], dtype: torch.dtype) -> dict[str, Any]:
    """The batch of B samples, all of one shape.

    `mp4` is (B, T, C, H, W): in [-1, 1] and `dtype`, or, where that is uint8, from 0 to 255 as decoded, which is a
    half of bfloat16 and a quarter of float32 to hand over. `num_frames` and `fps` are int64 (B,); `txt`, `kind`,
    `source` and `key` are lists of B strings.
    Of encoded samples also what they hold: `latents` (B, t, C, h, w), `condition_latents` (B, 1, C, h, w).
    """
    assert samples, "a batch of no samples"
    shapes = {tuple(s.pixels.shape) for s in samples}
    assert len(shapes) == 1, f"samples of several shapes in one batch: {sorted(shapes)}"
    assert all(s.pixels.dtype == torch.uint8 for s in samples)
    clips = [s.pixels for s in samples]
    # In a data worker, PyTorch's own collation allocates in the memory that it shares with the trainer.
    pixels = default_collate(clips) if dtype == torch.uint8 else to_model_range(torch.stack(clips), dtype)
    return {
        **_encoded(samples),
        "mp4": pixels,
        "txt": [s.caption for s in samples],
        "num_frames": torch.tensor([s.num_frames for s in samples], dtype=torch.int64),
        "fps": torch.tensor([s.fps for s in samples], dtype=torch.int64),
        "kind": [str(s.kind) for s in samples],
        "source": [s.source for s in samples],
        "key": [s.key for s in samples],
    }


def _encoded(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    parts = [s.encoded or {} for s in samples]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
