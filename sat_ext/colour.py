"""HDR curves and wide primaries to sRGB, by the code points of ITU-T H.273 (FFmpeg's and AVIF's numbers).

Diffuse white becomes sRGB's white: 203 cd/m2 of PQ and 75 % of HLG (ITU-R BT.2408). Brighter colours, and those
outside sRGB's gamut, are clipped, so that what sRGB can show keeps its colour."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

# swscale would silently read these with another matrix.
UNREADABLE_MATRICES = {
    10: "BT.2020 with constant luminance",
    11: "SMPTE ST 2085",
    13: "chromaticity-derived with constant luminance",
    14: "ICtCp",
    15: "IPT-C2 (Dolby Vision profile 5)",
}

_WHITE_NITS = 203.0  # ITU-R BT.2408, table 1
_DEPTH = 12  # bits of the tables; PQ's steps are invisible from 12 bits on (SMPTE ST 2084)
_LINEAR_STEPS = 1 << 14  # a step is at most a fifth of an 8-bit level, at black
_ROWS = 16  # converted together, so that intermediate values stay in the processor's cache

# x and y of red, green, blue and white. Standard definition's are near sRGB's, and players show them as sRGB.
_PRIMARIES = {
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),  # BT.2020
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351)),  # DCI-P3
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),  # Display P3
}
_SRGB = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290))


def _srgb(signal: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1; also of BT.709 and its kin, which players show by a display's curve."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _pq(signal: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084."""
    root = signal ** (32 / 2523)
    nits = 10000 * (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
    return nits / _WHITE_NITS


def _hlg(signal: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100's scene light. Its display gamma, 1.2 + 0.42 log10(peak / 1000), is 1 at a white of 88 cd/m2,
    which is that of an sRGB display (80)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return scene / ((np.exp((0.75 - c) / a) + b) / 12)


_CURVES: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    8: lambda signal: signal,
    16: _pq,
    17: lambda signal: signal**2.6 * (52.37 / 48),  # SMPTE ST 428-1: of a full signal's 52.37 cd/m2, white is 48
    18: _hlg,
}

Conversion = Callable[[np.ndarray], np.ndarray]  # uint8 or uint16 RGB (H, W, 3) to uint8 sRGB


@lru_cache(maxsize=8)
def to_srgb(transfer: int, primaries: int, peak: int = 65535) -> Conversion | None:
    """Converts RGB of this transfer and these primaries to sRGB; None if it can be shown as sRGB.

    `peak` is a full signal in uint16 pixels; in uint8 ones it is 255.

    >>> to_srgb(transfer=1, primaries=1) is None  # BT.709
    True
    >>> white = np.full((1, 1, 3), round(65535 * 0.58069), np.uint16)  # 203 cd/m2 in PQ
    >>> to_srgb(transfer=16, primaries=9)(white).tolist()
    [[[255, 255, 255]]]
    """
    if transfer not in _CURVES and primaries not in _PRIMARIES:
        return None
    curve = _CURVES.get(transfer, _srgb)
    shallow = curve(np.arange(256) / 255).astype(np.float32)
    # The middle of the values that share an entry, so that dropping their last bits darkens nothing.
    middles = (np.arange(1 << _DEPTH) + 0.5) * (1 << 16 - _DEPTH) - 0.5
    deep = curve(np.minimum(middles / peak, 1)).astype(np.float32)
    levels = encode_srgb(np.arange(_LINEAR_STEPS) / (_LINEAR_STEPS - 1))
    matrix = (_matrix(primaries) * (_LINEAR_STEPS - 1)).astype(np.float32).T

    def convert(rgb: np.ndarray) -> np.ndarray:
        is_deep = rgb.dtype == np.uint16
        out = np.empty(rgb.shape, np.uint8)
        for top in range(0, len(rgb), _ROWS):
            rows = rgb[top : top + _ROWS]
            light = (deep.take(rows >> (16 - _DEPTH)) if is_deep else shallow.take(rows)) @ matrix
            np.clip(light + np.float32(0.5), 0, _LINEAR_STEPS - 1, out=light)
            levels.take(light.astype(np.int32), out=out[top : top + _ROWS], mode="clip")
        return out

    return convert


def encode_srgb(light: np.ndarray) -> np.ndarray:
    """Linear light from 0 to 1 as 8-bit sRGB (IEC 61966-2-1)."""
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * signal).astype(np.uint8)


def _matrix(primaries: int) -> np.ndarray:
    """Linear RGB with these primaries to sRGB's; white stays white, whichever it was."""
    if primaries not in _PRIMARIES:
        return np.eye(3)
    matrix = np.linalg.solve(_to_xyz(_SRGB), _to_xyz(_PRIMARIES[primaries]))
    return matrix / matrix.sum(axis=1, keepdims=True)


def _to_xyz(chromaticities: tuple[tuple[float, float], ...]) -> np.ndarray:
    """RGB to XYZ, such that (1, 1, 1) is white."""
    columns = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in chromaticities]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
