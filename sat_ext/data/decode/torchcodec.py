"""Clips by torchcodec, where it is installed and finds FFmpeg's shared libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from sat_ext.data.decode.indexed import AT_ONCE, Miscounted, read_indexed
from sat_ext.data.decode.pick import Shape
from sat_ext.errors import ConfigError, MediaError


def read_torchcodec(path: str, times: Sequence[float], shape: Shape) -> np.ndarray:
    """See `read_frames`."""
    try:
        import torchcodec.decoders  # noqa: F401  # loads its libraries
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"decoder: torchcodec cannot be imported ({reason}); install one that fits this torch, and FFmpeg's "
            "shared libraries, or write pyav."
        ) from None
    try:
        return read_indexed(path, times, shape, _frames, open_gops=True)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, MediaError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MediaError(path, f"cannot be decoded by torchcodec: {reason}") from error


def _frames(path: str, count: int, places: list[int]) -> Iterator[np.ndarray]:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(os.path.abspath(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    if len(decoder) != count:
        raise Miscounted
    for first in range(0, len(places), AT_ONCE):
        yield from decoder.get_frames_at(places[first : first + AT_ONCE]).data.numpy()
