"""Facts of the CogVideoX family: what its autoencoder, transformer and text encoder make of a sample.

Sources: Yang et al. 2024, "CogVideoX", section 2, and the model YAMLs of CogVideo (sat/configs/ at tag v1.0 and on
the main branch). They hold for every published model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sat_ext.types import Bucket

TEMPORAL_COMPRESSION = 4  # pixel frames per latent frame after the first
LATENT_SIDE = 8  # pixels a side of one latent
LATENT_CHANNELS = 16
PATCH = 2  # latents a side of one token; in CogVideoX 1.5 latent frames too
TOKEN_SIDE = LATENT_SIDE * PATCH  # pixels
TEXT_TOKENS, TEXT_WIDTH = 226, 4096  # `max_length` and hidden size of the T5-XXL encoder
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
    `text_length` counts the caption's tokens."""

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


class Grid(NamedTuple):
    """Patches of a sample: latent frames (in CogVideoX 1.5 pairs of them), rows and columns.

    Token (t, y, x) of a sample is number (t * rows + y) * columns + x."""

    frames: int
    rows: int
    columns: int


def rotary_table(
    grid: Grid, head: int, *, stretch_to: Grid | None = None, theta: float = THETA,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosines and sines (tokens, head), float32, of the rotary embedding of `grid`.

    A head's first quarter turns with the frame, and three eighths each with row and column; pair i of n turns by
    coordinate / theta ** (i / n), both of its halves alike. Coordinates count patches, or with `stretch_to` lie in
    that grid (see `stretched`). As in `Rotary3DPositionEmbeddingMixin` of CogVideo's sat/dit_video_concat.py and
    `get_3d_rotary_pos_embed` of diffusers, which may be missing beside CogVideo's requirements."""
    coordinates = [torch.arange(size, device=device) for size in grid]
    if stretch_to is not None:
        coordinates[1:] = stretched(grid, stretch_to, device)
    turns = []
    for axis, width in enumerate((head // 4, head // 8 * 3, head // 8 * 3)):
        speeds = 1.0 / theta ** (torch.arange(0, width, 2, device=device).float() / width)
        turns.append((axis, torch.outer(coordinates[axis].float(), speeds).repeat_interleave(2, dim=1)))
    table = _on_grid(turns, grid)
    return table.cos(), table.sin()


def stretched(grid: Grid, native: Grid, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The coordinates of `grid`'s rows and columns when it lies in `native`, as large as fits and centred.

    From `first` on, a side of `length` would end at first + length * (n - 1) / n; diffusers has the slightly
    smaller (first + length) * (n - 1) / n, and the published models are run with that.

    >>> stretched(Grid(1, 4, 4), Grid(1, 4, 4))[1]
    tensor([0., 1., 2., 3.])
    >>> rows, columns = stretched(Grid(1, 4, 4), Grid(1, 2, 4))  # a square in a wide frame: the middle two columns
    >>> rows
    tensor([0.0000, 0.5000, 1.0000, 1.5000])
    >>> columns
    tensor([1.0000, 1.4167, 1.8333, 2.2500])
    """
    scale = min(native.rows / grid.rows, native.columns / grid.columns)
    coordinates = []
    for size, room in zip(grid[1:], native[1:], strict=True):
        length = round(size * scale)
        first = round((room - length) / 2)
        coordinates.append(torch.linspace(first, (first + length) * (size - 1) / size, size, device=device))
    return coordinates[0], coordinates[1]


def sinusoidal_table(
    grid: Grid, width: int, scales: Sequence[float] = (1.0, 1.0, 1.0), *, dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """CogVideoX-2B's embedding, (tokens, width); the coordinates of the grid's axes are divided by `scales`.

    A quarter of the width is for the frame, then three eighths each for column and row; of each part the first
    half are sines and the second cosines. As in `Basic3DPositionEmbeddingMixin` of CogVideo's
    sat/dit_video_concat.py."""
    parts = []
    for axis, part in ((0, width // 4), (2, width // 8 * 3), (1, width // 8 * 3)):
        speeds = 1.0 / THETA ** (torch.arange(part // 2, dtype=torch.float64) / (part / 2))
        turns = torch.outer((torch.arange(grid[axis]) / scales[axis]).double(), speeds)
        parts.append((axis, torch.cat([turns.sin(), turns.cos()], dim=1).float().to(device, dtype)))
    return _on_grid(parts, grid)


def _on_grid(parts: Sequence[tuple[int, Tensor]], grid: Grid) -> Tensor:
    """(tokens, sum of widths) of `parts`: each the axis of the grid that it follows, and values (size, width)."""
    spread = []
    for axis, values in parts:
        shape = [1, 1, 1, values.shape[1]]
        shape[axis] = grid[axis]
        spread.append(values.reshape(shape).expand(*grid, -1))
    return torch.cat(spread, dim=-1).flatten(0, 2)


def learned_positions(learned: Tensor, native: Grid, grid: Grid) -> Tensor:
    """A learned embedding (1, tokens of `native`, D) as that of `grid`, which has no more frames.

    Fewer frames take those of the first. Other sizes are resized frame by frame, bicubic with antialiasing; in
    time nothing is interpolated, as frame t of a short clip is frame t of a long one."""
    assert grid.frames <= native.frames
    frames = learned.reshape(*native, -1)[: grid.frames]
    if grid[1:] == native[1:]:
        return frames.flatten(0, 2)[None]
    resize = partial(functional.interpolate, size=grid[1:], mode="bicubic", antialias=True)
    # frame by frame, as float32 of all would take half a gigabyte of a GPU
    resized = [resize(frame.permute(2, 0, 1)[None].float()).to(learned.dtype) for frame in frames]
    return torch.cat([frame.flatten(2).transpose(1, 2) for frame in resized], dim=1)
