"""Samples for held-out batches, as rows of a contact sheet."""

from __future__ import annotations

from typing import Any

import torch

from sat_ext.contact_sheet import SheetRow
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.pixels import to_model_range, to_uint8


def sample_rows(
    engine: VideoDiffusionEngine,
    batch: dict[str, Any],
    generator: torch.Generator,
    *,
    steps: int,
    guidance_scale: float,
) -> list[SheetRow]:
    """One row a sample: what the engine makes of its caption, and the sample itself.

    `batch` holds `mp4` (B, T, C, H, W), uint8 or in [-1, 1], `txt` and `kind`. An image-to-video engine gets
    the first frames of clips; of stills it gets the caption alone, since the first frame would be the answer.
    """
    real = batch["mp4"]
    shows_first = engine.config.conditioning == "i2v" and batch["kind"][0] == "video"
    made = engine.sample(
        batch["txt"],
        frames=real.shape[1],
        height=real.shape[3],
        width=real.shape[4],
        first_frames=to_model_range(real[:, 0], torch.float32) if shows_first else None,
        steps=steps,
        guidance_scale=guidance_scale,
        generator=generator,
    )
    return [
        SheetRow(caption=caption, strips={"generated": to_uint8(m), "held out": to_uint8(r)})
        for caption, m, r in zip(batch["txt"], made, real)
    ]
