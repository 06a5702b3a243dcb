"""Facts of the CogVideoX family, once: what its autoencoder, transformer and text encoder make of a sample.

Sources: Yang et al. 2024, "CogVideoX", section 2, and the model YAMLs of CogVideo (sat/configs/ at tag v1.0 and on
the main branch). They hold for every published model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sat_ext.types import Bucket

TEMPORAL_COMPRESSION = 4  # pixel frames per latent frame after the first
LATENT_SIDE = 8  # pixels a side of one latent
LATENT_CHANNELS = 16
PATCH = 2  # latents a side of one token; in CogVideoX 1.5 latent frames too
TOKEN_SIDE = LATENT_SIDE * PATCH  # pixels
TEXT_TOKENS = 226  # `max_length` of the T5 encoder
# `scale_factor` of the latents: 2B has its own, 5B, 5B-I2V and the 1.5 models share one.
SCALE_FACTOR_2B = 1.15258426
SCALE_FACTOR = 0.7
OFS = 2.0  # what CogVideoX-1.5's image-to-video model was trained with (`ofs` in CogVideo's sat/sample_video.py)
THETA = 10000.0  # base of the wavelengths of all position embeddings


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` pixel frames (1 or 4k+1), without padding.

    >>> latent_frames(1), latent_frames(49)
    (1, 13)
    """
    return (frames - 1) // TEMPORAL_COMPRESSION + 1


def pixel_frames(latents: int) -> int:
    """Pixel frames that `latents` latent frames decode to.

    >>> pixel_frames(1), pixel_frames(13)
    (1, 49)
    """
    return (latents - 1) * TEMPORAL_COMPRESSION + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceShape:
    """What decides the transformer's work on a sample. The defaults are CogVideoX-5B's.

    `pixels_per_token` is a side in pixels; `latents_per_token` the temporal patch (2 in CogVideoX 1.5);
    `text_length` counts the caption's tokens.
    """

    hidden_size: int = 3072
    text_length: int = TEXT_TOKENS
    pixels_per_token: int = TOKEN_SIDE
    latents_per_token: int = 1


def tokens(bucket: Bucket, shape: SequenceShape = SequenceShape()) -> int:
    """Length of the transformer's sequence for one sample, text included.

    >>> tokens(Bucket(frames=49, height=480, width=720))  # 13 x 30 x 45 + 226
    17776
    """
    frames = math.ceil(latent_frames(bucket.frames) / shape.latents_per_token)
    rows, columns = bucket.height // shape.pixels_per_token, bucket.width // shape.pixels_per_token
    return frames * rows * columns + shape.text_length
