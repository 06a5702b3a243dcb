"""Position embeddings and final layer of CogVideo's networks, for sizes beside the configured one.

CogVideo 1.0 builds its tables for one size (`latent_height`, `latent_width`, `num_frames`) and takes as many of
their first entries as the input has tokens: right at that size, for any number of frames, and wrong at others.
These targets go by the input's own frames, rows and columns. At the configured size they hand over to the parent,
bit for bit; the weights and their names are the parent's. Token (t, y, x) is number (t * rows + y) * columns + x.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sat_ext.cogvideo.parent import subclass_of
from sat_ext.config import convert
from sat_ext.errors import ConfigError

ROTARY_PARENT = "dit_video_concat.Rotary3DPositionEmbeddingMixin"
SINUSOIDAL_PARENT = "dit_video_concat.Basic3DPositionEmbeddingMixin"
FINAL_PARENT = "dit_video_concat.FinalLayerMixin"
MODULES = "model.network_config.params.modules"
POSITION = f"{MODULES}.pos_embed_config.params"
FINAL = f"{MODULES}.final_layer_config.params"

Rotary = Literal["stretch", "count"]


class Grid(NamedTuple):
    """Patches of a batch: latent frames (in 1.5 pairs of them), rows and columns."""

    frames: int
    rows: int
    columns: int


class InterpolatedRotaryPositionEmbedding(nn.Module):
    """A target for `pos_embed_config`: rotary embedding and, where the model has one (5B-I2V), the learned one.

    The learned embedding of other sizes is resized frame by frame, bicubic with antialiasing, as in our engine;
    fewer frames take those of the first. In time nothing is interpolated: frame t of a short clip is frame t of a
    long one, which is what the model was trained with. More frames than were learned are refused.

    The rotary angles of other sizes go by `rotary`:

    - "stretch" lays the input, as large as fits and centred, into the configured grid, so that no coordinate lies
      outside of what the model was trained with. diffusers does so for 1.0 models, in training as in sampling
      (`get_resize_crop_region_for_grid` of its pipeline_cogvideox.py, `get_3d_rotary_pos_embed`), and so does our
      engine. The default for 1.0.
    - "count" gives row y the coordinate y, as a network built at that size has it (CogVideo's own sampler, with
      `latent_height` and `latent_width` changed). 1.5 models do so, and take nothing else.

    `parent` and its parameters stay in `params`. Raises `ConfigError` for an option that is unknown or of the
    other generation and, with the batch that has it, for a size that does not divide into patches.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor
    pos_embedding: Tensor | None

    def __new__(cls, *, parent: str = ROTARY_PARENT, **params: Any) -> InterpolatedRotaryPositionEmbedding:
        """An object of a class made here, over the parent's."""
        if cls is InterpolatedRotaryPositionEmbedding:
            methods = ["rotary", "attention_fn", "position_embedding_forward"]
            cls = subclass_of(cls, parent, params, methods=methods, where=POSITION)
        return super().__new__(cls)

    def __init__(
        self,
        *,
        height: int,
        width: int,
        compressed_num_frames: int,
        hidden_size_head: int,
        theta: float = 10000,
        rotary: Rotary | None = None,
        parent: str = ROTARY_PARENT,
        **params: Any,
    ) -> None:
        super().__init__(
            height=height,
            width=width,
            compressed_num_frames=compressed_num_frames,
            hidden_size_head=hidden_size_head,
            theta=theta,
            **params,
        )
        self.native = Grid(compressed_num_frames, height, width)
        self.grid = self.native  # of the batch in hand
        self.hidden_size_head, self.theta = hidden_size_head, float(theta)
        counts = self.freqs_cos.ndim == 4  # 1.5 keeps (T, h, w, D) and cuts the input's part out
        chosen: Rotary | None = convert(Rotary | None, rotary, f"{POSITION}.rotary")
        if counts and chosen == "stretch":
            raise ConfigError(f"{POSITION}.rotary: stretch is of 1.0 models, and this one counts; take it out.")
        self.stretch = chosen != "count" and not counts

    def position_embedding_forward(self, position_ids: Tensor, **kwargs: Any) -> Tensor | None:
        """The learned embedding (1, text + tokens, D) for `kwargs["images"]`, or None where the model has none."""
        if self.pos_embedding is None:
            return None
        grid = grid_of(kwargs)
        if grid.frames > self.native.frames:
            raise ConfigError(
                f"data.params.buckets.frames: a batch has {grid.frames} latent frames and the model's learned "
                f"position embedding {self.native.frames}; leave out what is longer than "
                "model.network_config.params.num_frames."
            )
        if grid[1:] == self.native[1:]:
            same: Tensor = super().position_embedding_forward(position_ids, **kwargs)  # type: ignore[misc]
            return same
        tokens = math.prod(self.native)
        text, learned = self.pos_embedding[:, :-tokens], self.pos_embedding[0, -tokens:]
        frames = learned.reshape(*self.native, -1).permute(0, 3, 1, 2)[: grid.frames]
        # one by one, as float32 of all frames would take half a gigabyte of a GPU
        resized = [_bicubic(frame, grid.rows, grid.columns) for frame in frames]
        return torch.cat([text, *resized], dim=1)

    def attention_fn(self, *args: Any, **kwargs: Any) -> Tensor:
        """The parent's attention, with the angles of the input's size."""
        self.grid = grid_of(kwargs)  # here, as 1.0 tells `rotary` nothing
        attended: Tensor = super().attention_fn(*args, **kwargs)  # type: ignore[misc]
        return attended

    def rotary(self, t: Tensor, **kwargs: Any) -> Tensor:
        """Queries or keys (B, heads, tokens, D), turned by the angles of their tokens."""
        inside = all(size <= table for size, table in zip(self.grid, self.native))
        if inside and (self.freqs_cos.ndim == 4 or self.grid[1:] == self.native[1:]):
            same: Tensor = super().rotary(t, **kwargs)  # type: ignore[misc]
            return same
        native = self.native if self.stretch else self.grid
        cosines, sines = angles(self.grid, native, self.hidden_size_head, self.theta, t.device)
        dtype = t.dtype if self.freqs_cos.ndim == 4 else self.freqs_cos.dtype  # as the parent rounds its table
        halves = torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2)
        return t * cosines.to(dtype) + halves * sines.to(dtype)


class SinusoidalPositionEmbedding(nn.Module):
    """A target for `pos_embed_config` of 2B: sines of the input's own rows and columns.

    Row y has the coordinate y / `height_interpolation`, as in a network built at that size
    (`get_3d_sincos_pos_embed` in CogVideo's sat/dit_video_concat.py), and as in diffusers' `CogVideoXPatchEmbed`.
    """

    pos_embedding: Tensor

    def __new__(cls, *, parent: str = SINUSOIDAL_PARENT, **params: Any) -> SinusoidalPositionEmbedding:
        """An object of a class made here, over the parent's."""
        if cls is SinusoidalPositionEmbedding:
            methods = ["position_embedding_forward"]
            cls = subclass_of(cls, parent, params, methods=methods, where=POSITION)
        return super().__new__(cls)

    def __init__(
        self,
        *,
        height: int,
        width: int,
        compressed_num_frames: int,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
        time_interpolation: float = 1.0,
        parent: str = SINUSOIDAL_PARENT,
        **params: Any,
    ) -> None:
        scales = {
            "time_interpolation": time_interpolation,
            "height_interpolation": height_interpolation,
            "width_interpolation": width_interpolation,
        }
        super().__init__(
            height=height, width=width, compressed_num_frames=compressed_num_frames, **scales, **params
        )
        self.native = Grid(compressed_num_frames, height, width)
        self.scales = tuple(scales.values())

    def position_embedding_forward(self, position_ids: Tensor, **kwargs: Any) -> Tensor:
        """The embedding (1, text + tokens, D) for `kwargs["images"]`."""
        grid, native = grid_of(kwargs), self.native
        if grid[1:] == native[1:] and grid.frames <= native.frames:
            same: Tensor = super().position_embedding_forward(position_ids, **kwargs)  # type: ignore[misc]
            return same
        text = self.pos_embedding[:, : -math.prod(native)]
        return torch.cat([text, sines_of(grid, self.scales, like=text)[None]], dim=1)


class FinalLayer(nn.Module):
    """A target for `final_layer_config`: puts patches together to the input's height and width.

    1.5 does so by itself.
    """

    def __new__(cls, *, parent: str = FINAL_PARENT, **params: Any) -> FinalLayer:
        """An object of a class made here, over the parent's."""
        if cls is FinalLayer:
            cls = subclass_of(cls, parent, params, methods=["final_forward"], where=FINAL)
        return super().__new__(cls)

    def __init__(self, *, parent: str = FINAL_PARENT, **params: Any) -> None:
        super().__init__(**params)

    def final_forward(self, logits: Tensor, **kwargs: Any) -> Tensor:
        """The latents (B, T, C, h, w) of tokens (B, text + tokens, D); h and w are those of `kwargs["images"]`."""
        self.latent_height, self.latent_width = kwargs["images"].shape[-2:]
        latents: Tensor = super().final_forward(logits, **kwargs)  # type: ignore[misc]
        return latents


def _bicubic(frame: Tensor, rows: int, columns: int) -> Tensor:
    """A frame's embedding (D, h, w) as that of another size, (1, rows * columns, D)."""
    resized = functional.interpolate(frame[None].float(), size=(rows, columns), mode="bicubic", antialias=True)
    return resized.to(frame.dtype).flatten(2).transpose(1, 2)


def grid_of(kwargs: dict[str, Any]) -> Grid:
    """The patches of the latents `images` (B, T, C, h, w), of which there are `seq_length`.

    1.5 says them (`rope_T`, `rope_H`, `rope_W`). In 1.0 a patch is square and of one frame.
    """
    if "rope_T" in kwargs:
        return Grid(kwargs["rope_T"], kwargs["rope_H"], kwargs["rope_W"])
    frames, _, height, width = kwargs["images"].shape[1:]
    patch = math.isqrt(frames * height * width // kwargs["seq_length"])
    if height % patch or width % patch:
        raise ConfigError(
            f"data.params.buckets.sizes: latents of {height}x{width} do not divide into patches of {patch}; use "
            f"heights and widths that are multiples of {8 * patch} pixels."
        )
    return Grid(frames, height // patch, width // patch)


@lru_cache(maxsize=16)  # every layer asks for the same ones
def angles(grid: Grid, native: Grid, head: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head), float32, of rotary embedding for `grid`, with `native` stretched over it.

    A head's first quarter turns with the frame, and three eighths each with row and column; pair i of n turns by
    coordinate / theta ** (i / n), both of its halves alike. As in `Rotary3DPositionEmbeddingMixin` of CogVideo's
    sat/dit_video_concat.py.
    """
    turns = []
    coordinates = (torch.arange(grid.frames), *stretched(grid, native))
    for axis, (where, width) in enumerate(zip(coordinates, (head // 4, head // 8 * 3, head // 8 * 3))):
        speeds = 1.0 / (theta ** (torch.arange(0, width, 2).float() / width))
        turn = (where.float()[:, None] * speeds).repeat_interleave(2, dim=1)
        shape = [1, 1, 1, width]
        shape[axis] = len(where)
        turns.append(turn.reshape(shape).expand(*grid, width))
    with torch.inference_mode(False):  # what is kept must do for training too
        table = torch.cat(turns, dim=-1).flatten(0, 2)
        return table.cos().to(device), table.sin().to(device)


def stretched(grid: Grid, native: Grid) -> tuple[Tensor, Tensor]:
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
    for size, room in zip(grid[1:], native[1:]):
        length = round(size * scale)
        first = round((room - length) / 2)
        coordinates.append(torch.linspace(first, (first + length) * (size - 1) / size, size))
    return coordinates[0], coordinates[1]


def sines_of(grid: Grid, scales: tuple[float, ...], *, like: Tensor) -> Tensor:
    """The sinusoidal embedding (tokens, D) of `like`'s width D, type and device.

    A quarter of D is for the frame, then three eighths each for column and row; of each part the first half are
    sines and the second cosines.
    """
    width, parts = like.shape[-1], []
    for axis, part in ((0, width // 4), (2, width // 8 * 3), (1, width // 8 * 3)):
        speeds = 10000.0 ** -(torch.arange(part // 2, dtype=torch.float64) / (part / 2))
        turns = (torch.arange(grid[axis]) / scales[axis]).double()[:, None] * speeds
        shape = [1, 1, 1, part]
        shape[axis] = grid[axis]
        values = torch.cat([turns.sin(), turns.cos()], dim=1).float().to(like)
        parts.append(values.reshape(shape).expand(*grid, part))
    return torch.cat(parts, dim=-1).flatten(0, 2)
