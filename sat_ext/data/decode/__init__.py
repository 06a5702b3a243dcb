"""Media to uint8 RGB frames. Clips are read by time, so that every decoder and frame rate means the same."""

from collections.abc import Callable, Sequence

import numpy as np

from sat_ext.data.decode.indexed import read_decord, read_torchcodec
from sat_ext.data.decode.pyav import read_pyav
from sat_ext.data.decode.stills import read_animated_webp, read_still
from sat_ext.data.transform import Fit
from sat_ext.media import is_webp

__all__ = ["DECODERS", "read_frames", "read_still"]

# PyAV by default: decord cannot read AV1, fails on VP9, and does not notice damage that FFmpeg conceals.
DECODERS: dict[str, Callable[[str, Sequence[float], Fit], np.ndarray]] = {
    "auto": read_pyav, "pyav": read_pyav, "decord": read_decord, "torchcodec": read_torchcodec,
}  # fmt: skip


def read_frames(path: str, times: Sequence[float], *, fit: Fit, decoder: str = "auto") -> np.ndarray:
    """The frames on display at `times`, upright and fitted, as uint8 (len(times), 3, height, width).

    `times` are seconds from the start of the first frame, in any order. On display at t is the last frame
    that starts at or before t + `TIME_TOLERANCE`; before the first frame the first, after the last the last.
    The file is read once, from the key frame before the earliest time to the frame after the latest.

    All `DECODERS` give equal frames. Raises `ConfigError` for one that is not installed, and `MediaError` when a
    wanted frame is missing or damaged.
    """
    assert len(times) > 0, "no times asked for"
    read = read_animated_webp if is_webp(path) else DECODERS[decoder]  # FFmpeg does not read animated WebP
    return read(path, times, fit)
