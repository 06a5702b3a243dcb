"""Samples of one bucket to the batch that SAT and the engine take."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from sat_ext.pixels import to_model_range
from sat_ext.types import Sample


def collate(samples: Sequence[Sample], dtype: torch.dtype) -> dict[str, Any]:
    """The batch of B samples, all of one shape.

    `mp4` is (B, T, C, H, W), in [-1, 1] and `dtype`, or as decoded where that is uint8. Latents stay as they are,
    (B, t, C, h, w), and those of an image-to-video model bring `condition_latents` (B, 1, C, h, w). `num_frames`
    and `fps` are int64 (B,), the others lists of B strings.
    """
    assert samples, "a batch of no samples"
    shapes = {tuple(s.pixels.shape) for s in samples}
    assert len(shapes) == 1, f"samples of several shapes in one batch: {sorted(shapes)}"
    clips = [s.pixels for s in samples]
    # PyTorch's collation allocates in the memory that a data worker shares with the trainer; `to_model_range` does
    # not, and its result is copied there once more.
    is_final = dtype == torch.uint8 or clips[0].dtype != torch.uint8
    conditions = [s.condition for s in samples if s.condition is not None]
    return {
        "mp4": default_collate(clips) if is_final else to_model_range(torch.stack(clips), dtype),
        **({"condition_latents": default_collate(conditions)} if conditions else {}),
        "txt": [s.caption for s in samples],
        "num_frames": torch.tensor([s.num_frames for s in samples], dtype=torch.int64),
        "fps": torch.tensor([s.fps for s in samples], dtype=torch.int64),
        "kind": [str(s.kind) for s in samples],
        "source": [s.source for s in samples],
        "key": [s.key for s in samples],
    }
