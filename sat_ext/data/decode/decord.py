"""Clips by decord, which SAT's users know. It does not notice frames whose errors FFmpeg conceals."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from sat_ext.data.decode.indexed import AT_ONCE, Miscounted, read_indexed
from sat_ext.data.decode.pick import Shape
from sat_ext.errors import ConfigError, MediaError


def read_decord(path: str, times: Sequence[float], shape: Shape) -> np.ndarray:
    """See `read_frames`."""
    try:
        import decord
    except ImportError:
        raise ConfigError("decoder: decord is not installed; pip install decord, or write pyav.") from None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        return read_indexed(path, times, shape, _frames, open_gops=False)
    except (decord.DECORDError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MediaError(path, f"cannot be decoded by decord: {reason}") from error


def _frames(path: str, count: int, places: list[int]) -> Iterator[np.ndarray]:
    import decord

    reader = None
    try:
        reader = decord.VideoReader(os.path.abspath(path), num_threads=1)
        if len(reader) != count:
            raise Miscounted
        for first in range(0, len(places), AT_ONCE):
            yield from reader.get_batch(places[first : first + AT_ONCE]).asnumpy()
    finally:
        del reader  # it decodes on, without limit, for as long as it or a traceback with it lives
