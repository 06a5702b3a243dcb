"""Samples of one bucket to the batch that SAT and the engine take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sat_ext.types import Sample


def collate(samples: Sequence[Sample], dtype: torch.dtype) -> dict[str, Any]:
    """The batch of B samples, all of one shape.

    `mp4` is (B, T, C, H, W) in [-1, 1] and `dtype`; `num_frames` and `fps` are int64 (B,); `txt`, `kind`,
    `source` and `key` are lists of B strings.
    """
    assert samples, "a batch of no samples"
    shapes = {tuple(s.pixels.shape) for s in samples}
    assert len(shapes) == 1, f"samples of several shapes in one batch: {sorted(shapes)}"
    pixels = torch.empty((len(samples), *shapes.pop()), dtype=dtype)
    for row, sample in zip(pixels, samples, strict=True):
        assert sample.pixels.dtype == torch.uint8, sample.pixels.dtype
        # Frame by frame: the float32 copy, needed for exact rounding to `dtype`, then stays in the cache.
        for out, frame in zip(row, sample.pixels, strict=True):
            out.copy_(frame.to(torch.float32).div_(127.5).sub_(1))
    return {
        "mp4": pixels,
        "txt": [s.caption for s in samples],
        "num_frames": torch.tensor([s.num_frames for s in samples], dtype=torch.int64),
        "fps": torch.tensor([s.fps for s in samples], dtype=torch.int64),
        "kind": [str(s.kind) for s in samples],
        "source": [s.source for s in samples],
        "key": [s.key for s in samples],
    }
