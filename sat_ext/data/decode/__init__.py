"""Media to uint8 RGB frames. Clips are read by time, so that every decoder and frame rate means the same."""

from collections.abc import Callable, Sequence
from typing import Protocol, overload

import numpy as np
import torch

from sat_ext.data.decode.indexed import read_decord, read_torchcodec
from sat_ext.data.decode.pick import Shape
from sat_ext.data.decode.pyav import read_pyav
from sat_ext.data.decode.rgb import as_displayed
from sat_ext.data.decode.stills import read_animated_webp, read_picture
from sat_ext.errors import MediaError
from sat_ext.media import is_webp

# PyAV by default: decord cannot read AV1, fails on VP9, and does not notice damage that FFmpeg conceals.
DECODERS: dict[str, Callable[[str, Sequence[float], Shape], np.ndarray]] = {
    "auto": read_pyav,
    "pyav": read_pyav,
    "decord": read_decord,
    "torchcodec": read_torchcodec,
}


class FrameFit(Protocol):
    """Crops and resizes each frame as soon as it is decoded: `sat_ext.data.transform.Fit`."""

    def __call__(self, pixels: np.ndarray, shown: tuple[int, int] | None = None) -> torch.Tensor:
        """uint8 (H, W, 3) to uint8 (3, height, width); `shown`: (width, height) as displayed, where not (W, H)."""

    def least(self, width: int, height: int) -> tuple[int, int] | None:
        """The smallest (width, height) at which a picture of this size may be decoded; None: at full size."""


@overload
def read_still(path: str, *, fit: None = None) -> np.ndarray: ...
@overload
def read_still(path: str, *, fit: FrameFit) -> torch.Tensor: ...
def read_still(path: str, *, fit: FrameFit | None = None) -> np.ndarray | torch.Tensor:
    """An image in sRGB, upright by its EXIF data, flattened on white, as uint8 (1, H, W, 3).

    With `fit` a tensor, uint8 (1, 3, height, width); a JPEG is then decoded no larger than needed. Of an
    animation, the first frame. Raises `MediaError` for a file that is missing, damaged, of no known format, larger
    than `MAX_PIXELS`, or outside of which `fit` would crop.
    """
    if fit is None:
        return read_picture(path, lambda pixels, _: np.array(pixels), least=None)
    return torch.from_numpy(read_picture(path, _shaped(path, fit), least=fit.least))


@overload
def read_frames(path: str, times: Sequence[float], *, decoder: str = "auto", fit: None = None) -> np.ndarray: ...
@overload
def read_frames(path: str, times: Sequence[float], *, decoder: str = "auto", fit: FrameFit) -> torch.Tensor: ...
def read_frames(
    path: str, times: Sequence[float], *, decoder: str = "auto", fit: FrameFit | None = None
) -> np.ndarray | torch.Tensor:
    """The frames on display at `times`, upright and with square pixels, as uint8 (len(times), H, W, 3).

    With `fit` a tensor, uint8 (len(times), 3, height, width): each frame is resized as it is decoded, so that the
    large ones are never all in memory.

    `times` are seconds from the start of the first frame, in any order. On display at t is the last frame
    that starts at or before t + `TIME_TOLERANCE`; before the first frame the first, after the last the last.
    The file is read once, from the key frame before the earliest time to the frame after the latest.

    All `DECODERS` give equal frames. Raises `ConfigError` for one that is not installed, and `MediaError` when a
    wanted frame is missing or damaged.
    """
    assert len(times) > 0, "no times asked for"
    shape = as_displayed if fit is None else _shaped(path, fit)
    read = read_animated_webp if is_webp(path) else DECODERS[decoder]  # FFmpeg does not read animated WebP
    frames = read(path, times, shape)
    return frames if fit is None else torch.from_numpy(frames)


def _shaped(path: str, fit: FrameFit) -> Shape:
    def shape(pixels: np.ndarray, shown: tuple[int, int] | None) -> np.ndarray:
        try:
            return fit(pixels, shown).numpy()
        except ValueError as error:
            raise MediaError(path, str(error)) from error

    return shape
