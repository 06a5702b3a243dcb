"""Position embeddings and final layer of CogVideo's networks, for sizes beside the configured one.

CogVideo 1.0 builds its tables for one size (`latent_height`, `latent_width`, `num_frames`) and takes as many of
their first entries as the input has tokens: right at that size, for any number of frames, and wrong at others.
These targets go by the input's own frames, rows and columns. At the configured size they call the parent, so
nothing changes there; the weights and their names are the parent's."""

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sat_ext.cogvideo.target import Target
from sat_ext.cogvideox import LATENT_SIDE, THETA, Grid, learned_positions, rotary_table, sinusoidal_table
from sat_ext.config import convert
from sat_ext.errors import ConfigError

MODULES = "model.network_config.params.modules"
POSITION = f"{MODULES}.pos_embed_config.params"

Rotary = Literal["stretch", "count"]


class InterpolatedRotaryPositionEmbedding(Target, nn.Module):
    """A target for `pos_embed_config`: rotary embedding and, where the model has one (5B-I2V), the learned one.

    The learned embedding is resized (`learned_positions`). The rotary angles of other sizes go by `rotary`:

    - "stretch" lays the input, as large as fits and centred, into the configured grid, so that no coordinate is
      outside of what the model was trained with. diffusers does this for 1.0 models, in training and in sampling
      (`get_resize_crop_region_for_grid` of its pipeline_cogvideox.py), and so does our engine. Default for 1.0.
    - "count" gives row y the coordinate y, as in a network that is built at that size (CogVideo's own sampler,
      with `latent_height` and `latent_width` changed). The only choice for 1.5 models.

    Raises `ConfigError` for an option of the other generation and, with the batch that has them, for more frames
    than were learned and for a size that does not divide into patches."""

    PARENT = "dit_video_concat.Rotary3DPositionEmbeddingMixin"
    WHERE = POSITION
    CALLS = ("rotary", "attention_fn", "position_embedding_forward")
    freqs_cos: Tensor
    pos_embedding: Tensor | None

    def __init__(self, *, rotary: Rotary | None = None, **params: Any) -> None:
        super().__init__(**params)
        self.native = self.grid = native_grid(params)  # `grid` is the current batch's
        self.hidden_size_head, self.theta = params["hidden_size_head"], float(params.get("theta", THETA))
        self.cuts = self.freqs_cos.ndim == 4  # 1.5 keeps a table (T, h, w, D) and cuts the input's part out
        chosen: Rotary | None = convert(Rotary | None, rotary, f"{POSITION}.rotary")
        if self.cuts and chosen == "stretch":
            raise ConfigError(f"{POSITION}.rotary: stretch is for 1.0 models, and this one counts; remove it.")
        self.stretch_to = None if self.cuts or chosen == "count" else self.native

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
            return super().position_embedding_forward(position_ids, **kwargs)  # type: ignore[misc]
        text, learned = self.pos_embedding.tensor_split([-math.prod(self.native)], dim=1)
        return torch.cat([text, learned_positions(learned, self.native, grid)], dim=1)

    def attention_fn(self, *args: Any, **kwargs: Any) -> Tensor:
        """The parent's attention, with the angles of the input's size."""
        self.grid = grid_of(kwargs)  # kept, as 1.0's `attention_fn` passes nothing on to `rotary`
        return super().attention_fn(*args, **kwargs)  # type: ignore[misc]

    def rotary(self, t: Tensor, **kwargs: Any) -> Tensor:
        """Queries or keys (B, heads, tokens, D), turned by the angles of their tokens."""
        inside = all(size <= table for size, table in zip(self.grid, self.native, strict=True))
        if inside and (self.cuts or self.grid[1:] == self.native[1:]):
            return super().rotary(t, **kwargs)  # type: ignore[misc]
        cosines, sines = angles(self.grid, self.stretch_to, self.hidden_size_head, self.theta, t.device)
        dtype = t.dtype if self.cuts else self.freqs_cos.dtype  # as the parent rounds its table
        halves = torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2)
        return t * cosines.to(dtype) + halves * sines.to(dtype)


class SinusoidalPositionEmbedding(Target, nn.Module):
    """A target for `pos_embed_config` of 2B: sines of the input's own rows and columns.

    Row y has the coordinate y / `height_interpolation`, as in a network built at that size
    (`get_3d_sincos_pos_embed` in CogVideo's sat/dit_video_concat.py), and as in diffusers' `CogVideoXPatchEmbed`.
    """

    PARENT = "dit_video_concat.Basic3DPositionEmbeddingMixin"
    WHERE = POSITION
    CALLS = ("position_embedding_forward",)
    pos_embedding: Tensor

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self.native = native_grid(params)
        self.scales = [params.get(f"{axis}_interpolation", 1.0) for axis in ("time", "height", "width")]

    def position_embedding_forward(self, position_ids: Tensor, **kwargs: Any) -> Tensor:
        """The embedding (1, text + tokens, D) for `kwargs["images"]`."""
        grid = grid_of(kwargs)
        if grid[1:] == self.native[1:] and grid.frames <= self.native.frames:
            return super().position_embedding_forward(position_ids, **kwargs)  # type: ignore[misc]
        text = self.pos_embedding[:, : -math.prod(self.native)]
        video = sinusoidal_table(grid, text.shape[-1], self.scales, dtype=text.dtype, device=text.device)
        return torch.cat([text, video[None]], dim=1)


class FinalLayer(Target, nn.Module):
    """A target for `final_layer_config` of 1.0: puts patches together to the input's height and width."""

    PARENT = "dit_video_concat.FinalLayerMixin"
    WHERE = f"{MODULES}.final_layer_config.params"
    CALLS = ("final_forward",)

    def final_forward(self, logits: Tensor, **kwargs: Any) -> Tensor:
        """The latents (B, T, C, h, w) of tokens (B, text + tokens, D); h and w are those of `kwargs["images"]`."""
        self.latent_height, self.latent_width = kwargs["images"].shape[-2:]
        return super().final_forward(logits, **kwargs)  # type: ignore[misc]


def native_grid(params: dict[str, Any]) -> Grid:
    """The size that a position embedding is configured for, of its `params` (`DiffusionTransformer` adds them)."""
    return Grid(params["compressed_num_frames"], params["height"], params["width"])


def grid_of(kwargs: dict[str, Any]) -> Grid:
    """The patches of the latents `images` (B, T, C, h, w), of which there are `seq_length`."""
    if "rope_T" in kwargs:  # 1.5
        return Grid(kwargs["rope_T"], kwargs["rope_H"], kwargs["rope_W"])
    frames, _, height, width = kwargs["images"].shape[1:]
    patch = math.isqrt(frames * height * width // kwargs["seq_length"])  # 1.0: square, and of one frame
    if height % patch or width % patch:
        raise ConfigError(
            f"data.params.buckets.sizes: latents of {height}x{width} do not divide into patches of {patch}; use "
            f"heights and widths that are multiples of {LATENT_SIDE * patch} pixels."
        )
    return Grid(frames, height // patch, width // patch)


@lru_cache(maxsize=16)  # every layer asks for the same ones
def angles(
    grid: Grid, stretch_to: Grid | None, head: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head), float32; see `rotary_table`."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        cosines, sines = rotary_table(grid, head, stretch_to=stretch_to, theta=theta)
        return cosines.to(device), sines.to(device)
