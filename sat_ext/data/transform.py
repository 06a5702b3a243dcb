"""Decoded frames to the size of their bucket."""

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

# A picture decoded at 1/2, 1/4 or 1/8 of its size stays this many times larger than its target, so that what such
# decoding blurs is finer than the target can show. On detailed photographs the PSNR against decoding at full size
# is 36 dB or more; at 1.5 it is down to 30.
_SPARE = 2.5


@dataclass(frozen=True, slots=True)
class Fit:
    """Frames to `height` x `width`: cuts out the centre in the target's proportions, and resizes it (antialiased
    bicubic in uint8).

    `crop` is (left, top, width, height) in pixels as displayed; None is the whole frame.
    """

    height: int
    width: int
    crop: tuple[int, int, int, int] | None = None

    def __call__(self, pixels: np.ndarray, shown: tuple[int, int] | None = None) -> torch.Tensor:
        """One frame, uint8 (H, W, 3), as uint8 (3, height, width), not contiguous.

        `shown` is the frame's (width, height) as displayed, if that is not (W, H): for non-square pixels, and for
        a picture decoded at a part of its size. Raises `ValueError` for a crop outside the frame.
        """
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, pixels.shape
        # Cut first, in whole source pixels, so that a panorama never becomes a huge intermediate image. It differs
        # from "resize to cover, then crop" by less than one source pixel.
        left, top, width, height = self._box(*(shown or pixels.shape[1::-1]))
        if shown is not None:
            left, width = _scaled(left, width, shown[0], pixels.shape[1])
            top, height = _scaled(top, height, shown[1], pixels.shape[0])
        box = _contiguous(pixels[top : top + height, left : left + width])
        # torch resizes uint8 fastest in a (1, 3, H, W) view of channels-last memory, first stride included: 1.0 ms
        # a 720p frame (1.5 with another first stride, 2.2 in planes, 30 in float32).
        frame = torch.from_numpy(box)[None].permute(0, 3, 1, 2)
        if (height, width) == (self.height, self.width):
            return frame[0].clone()  # the decoder or the next call reuses the memory
        return F.interpolate(frame, size=(self.height, self.width), mode="bicubic", antialias=True)[0]

    def least(self, width: int, height: int) -> tuple[int, int] | None:
        """The smallest (width, height) at which a picture of this size may be decoded; None: at full size."""
        try:
            _, _, box_width, box_height = self._box(width, height)
        except ValueError:  # which the call that resizes it will raise again
            return None
        ratio = min(box_width / self.width, box_height / self.height)
        if ratio < 2 * _SPARE:
            return None
        return math.ceil(width * _SPARE / ratio), math.ceil(height * _SPARE / ratio)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of what is cut from a frame of this displayed size.

        >>> Fit(480, 720)._box(1920, 1080)
        (150, 0, 1620, 1080)
        """
        left, top, crop_width, crop_height = self.crop or (0, 0, width, height)
        if min(left, top) < 0 or left + crop_width > width or top + crop_height > height:
            crop = [left, top, crop_width, crop_height]
            raise ValueError(f"its crop {crop} (left, top, width, height) is outside its {width}x{height} pixels")
        scale = max(self.height / crop_height, self.width / crop_width)
        box_width = min(crop_width, max(1, round(self.width / scale)))
        box_height = min(crop_height, max(1, round(self.height / scale)))
        return left + (crop_width - box_width) // 2, top + (crop_height - box_height) // 2, box_width, box_height


_scratch = threading.local()  # one frame a thread, as allocating each costs as much as copying into it


def _contiguous(pixels: np.ndarray) -> np.ndarray:
    """The pixels in contiguous memory, which the next call in this thread reuses."""
    if pixels.flags.c_contiguous and pixels.flags.writeable:
        return pixels
    memory = getattr(_scratch, "memory", None)
    if memory is None or memory.size < pixels.size:
        memory = _scratch.memory = np.empty(pixels.size, np.uint8)
    out = memory[: pixels.size].reshape(pixels.shape)
    np.copyto(out, pixels)
    return out


def _scaled(start: int, length: int, shown: int, stored: int) -> tuple[int, int]:
    """A range of displayed pixels as stored pixels, at least one."""
    first = min(stored - 1, math.floor(start * stored / shown + 0.5))
    return first, min(stored, max(first + 1, math.floor((start + length) * stored / shown + 0.5))) - first
