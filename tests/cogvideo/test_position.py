"""The position targets over small doubles of CogVideo's mixins: the same interface, tables of plain numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sat_ext.cogvideo.position import (
    FinalLayer,
    InterpolatedRotaryPositionEmbedding,
    SinusoidalPositionEmbedding,
    angles,
)
from sat_ext.cogvideox import Grid
from sat_ext.errors import ConfigError

TEXT, HEAD = 3, 16
SIZE = {"height": 2, "width": 4, "compressed_num_frames": 3, "hidden_size": 16}
CPU = torch.device("cpu")
WHERE = "model.network_config.params.modules.pos_embed_config.params"


class Rotary10(nn.Module):
    """1.0: flat tables, and attention that tells `rotary` nothing.

    Its cosines are 1, 2, 3, ... for tokens 0, 1, 2, ..., so that a test sees whose they are.
    """

    def __init__(
        self,
        height: int,
        width: int,
        compressed_num_frames: int,
        hidden_size: int,
        hidden_size_head: int,
        text_length: int,
        theta: float = 10000,
        learnable_pos_embed: bool = False,
    ) -> None:
        super().__init__()
        count = height * width * compressed_num_frames
        table = torch.arange(1.0, count + 1)[:, None].expand(-1, hidden_size_head).contiguous()
        self.register_buffer("freqs_cos", table)
        self.register_buffer("freqs_sin", torch.zeros_like(table))
        self.text_length = text_length
        learned = torch.randn(1, text_length + count, hidden_size, generator=torch.Generator().manual_seed(0))
        self.pos_embedding = nn.Parameter(learned) if learnable_pos_embed else None

    def rotary(self, t: Tensor) -> Tensor:
        return t * self.freqs_cos[: t.shape[2]]

    def position_embedding_forward(self, position_ids: Any, **kwargs: Any) -> Tensor | None:
        if self.pos_embedding is None:
            return None
        return self.pos_embedding[:, : self.text_length + kwargs["seq_length"]]

    def attention_fn(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        return self.rotary(query[:, :, self.text_length :])


class Rotary15(Rotary10):
    """1.5: tables (T, h, w, D), of which `rotary` takes the input's part."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        table = self.freqs_cos.reshape(params["compressed_num_frames"], params["height"], params["width"], -1)
        del self.freqs_cos
        self.freqs_cos = table

    def rotary(self, t: Tensor, **kwargs: Any) -> Tensor:
        part = self.freqs_cos[: kwargs["rope_T"], : kwargs["rope_H"], : kwargs["rope_W"]]
        return t * part.flatten(0, 2)

    def attention_fn(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        return self.rotary(query[:, :, kwargs["text_length"] :], **kwargs)


class Sines(nn.Module):
    def __init__(
        self,
        height: int,
        width: int,
        compressed_num_frames: int,
        hidden_size: int,
        text_length: int = 0,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
        time_interpolation: float = 1.0,
    ) -> None:
        super().__init__()
        self.text_length = text_length
        table = torch.zeros(1, text_length + height * width * compressed_num_frames, hidden_size)
        self.pos_embedding = nn.Parameter(table, requires_grad=False)
        nn.init.normal_(self.pos_embedding)

    def position_embedding_forward(self, position_ids: Any, **kwargs: Any) -> Tensor:
        return self.pos_embedding[:, : self.text_length + kwargs["seq_length"]]


class Last(nn.Module):
    def __init__(self, patch_size: int, latent_width: int, latent_height: int) -> None:
        super().__init__()
        self.patch_size, self.latent_width, self.latent_height = patch_size, latent_width, latent_height

    def final_forward(self, logits: Tensor, **kwargs: Any) -> Tensor:
        p, rows, columns = (
            self.patch_size,
            self.latent_height // self.patch_size,
            self.latent_width // self.patch_size,
        )
        patches = logits[:, kwargs["text_length"] :].reshape(len(logits), -1, rows, columns, p, p)
        return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, None]


def name_of(cls: type) -> str:
    return f"{__name__}.{cls.__name__}"


def embedding(parent: type = Rotary10, **params: Any) -> Any:
    return InterpolatedRotaryPositionEmbedding(
        parent=name_of(parent), **(SIZE | {"hidden_size_head": HEAD, "text_length": TEXT} | params)
    )


def inputs(frames: int, rows: int, columns: int, *, says_grid: bool = False) -> dict[str, Any]:
    """What the network tells its mixins of latents with 2x2 patches."""
    told = {"images": torch.empty(1, frames, 5, 2 * rows, 2 * columns), "seq_length": frames * rows * columns}
    grid = {"rope_T": frames, "rope_H": rows, "rope_W": columns} if says_grid else {}
    return told | grid | {"text_length": TEXT}


def turned(module: Any, frames: int, rows: int, columns: int, **kwargs: Any) -> Tensor:
    """What attention makes of queries (1, 0, 1, 0, ...): cosines at the ones, sines beside."""
    query = torch.zeros(1, 1, TEXT + frames * rows * columns, HEAD)
    query[..., ::2] = 1
    told = inputs(frames, rows, columns, **kwargs)
    result: Tensor = module.attention_fn(query, query, query, None, **told)
    return result[0, 0]


def turns(t: float, y: float, x: float, theta: float = 10000.0) -> Tensor:
    """The angles of a token's pairs: a quarter of the head for t, three eighths each for y and x."""
    parts = [(t, HEAD // 4), (y, HEAD * 3 // 8), (x, HEAD * 3 // 8)]
    return torch.tensor([where * theta ** (-2 * i / width) for where, width in parts for i in range(width // 2)])


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_at_the_configured_size_the_parent_turns(frames: int) -> None:
    count = frames * 8
    for module in (embedding(), embedding(rotary="count")):
        assert torch.equal(turned(module, frames, 2, 4)[:, 0], torch.arange(1.0, count + 1))


def test_counting_gives_every_token_the_angles_of_its_place() -> None:
    result = turned(embedding(rotary="count"), 2, 5, 3).reshape(2, 5, 3, HEAD)
    for t, y, x in [(0, 0, 0), (1, 0, 0), (0, 4, 0), (0, 0, 2), (1, 3, 1)]:
        torch.testing.assert_close(result[t, y, x, ::2], turns(t, y, x).cos())
        torch.testing.assert_close(result[t, y, x, 1::2], turns(t, y, x).sin())


def test_stretching_keeps_every_coordinate_inside_the_configured_grid() -> None:
    result = turned(embedding(), 2, 8, 4).reshape(2, 8, 4, HEAD)  # high in wide: one column, in the middle
    for (t, y, x), place in {(0, 0, 0): (0, 0, 2), (1, 0, 0): (1, 0, 2), (0, 7, 0): (0, 1.75, 2)}.items():
        torch.testing.assert_close(result[t, y, x, ::2], turns(*place).cos())
        torch.testing.assert_close(result[t, y, x, 1::2], turns(*place).sin())


@pytest.mark.parametrize("rows, columns", [(45, 30), (36, 36), (20, 50), (60, 90), (31, 44)])
def test_stretched_angles_are_those_of_diffusers(rows: int, columns: int) -> None:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    crop = get_resize_crop_region_for_grid((rows, columns), 45, 30)
    theirs = get_3d_rotary_pos_embed(64, crop, (rows, columns), 3)
    ours = angles(Grid(3, rows, columns), Grid(13, 30, 45), 64, 10000.0, CPU)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_theta_is_the_configured_one() -> None:
    result = turned(embedding(rotary="count", theta=100), 1, 3, 3).reshape(3, 3, HEAD)
    torch.testing.assert_close(result[2, 1, ::2], turns(0, 2, 1, theta=100.0).cos())


def test_more_frames_than_configured_count_on() -> None:
    result = turned(embedding(), 5, 2, 4).reshape(5, 2, 4, HEAD)
    torch.testing.assert_close(result[4, 1, 3, ::2], turns(4, 1, 3).cos())


def test_angles_are_rounded_as_the_parents_table_is() -> None:
    module = embedding(rotary="count").bfloat16()
    query = torch.zeros(1, 1, TEXT + 9, HEAD, dtype=torch.bfloat16)
    assert module.attention_fn(query, query, query, None, **inputs(1, 3, 3)).dtype == torch.bfloat16


def test_angles_first_made_in_inference_mode_train() -> None:
    angles.cache_clear()
    with torch.inference_mode():
        cosines, _ = angles(Grid(1, 7, 7), None, HEAD, 10000.0, CPU)
    weight = torch.ones(1, requires_grad=True)
    (weight * cosines).sum().backward()


def test_1_5_cuts_out_of_its_table_and_counts_beyond_it() -> None:
    module = embedding(Rotary15)
    inside = turned(module, 2, 2, 3, says_grid=True)[:, 0]
    assert inside.tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15]
    beyond = turned(module, 1, 4, 2, says_grid=True).reshape(4, 2, HEAD)
    torch.testing.assert_close(beyond[3, 1, ::2], turns(0, 3, 1).cos())


def test_1_5_refuses_to_stretch() -> None:
    with pytest.raises(ConfigError) as error:
        embedding(Rotary15, rotary="stretch")
    assert str(error.value) == (f"{WHERE}.rotary: stretch is for 1.0 models, and this one counts; remove it.")


def test_the_learned_embedding_is_the_parents_at_the_configured_size() -> None:
    module = embedding(learnable_pos_embed=True)
    for frames in (1, 3):
        found = module.position_embedding_forward(None, **inputs(frames, 2, 4))
        assert torch.equal(found, module.pos_embedding[:, : TEXT + 8 * frames])


def test_the_learned_embedding_of_another_size_is_resized_in_space_alone() -> None:
    module = embedding(learnable_pos_embed=True)
    with torch.no_grad():  # the first channels of the token at (t, y, x) are t, y, x
        axes = torch.meshgrid(torch.arange(3.0), torch.arange(2.0), torch.arange(4.0), indexing="ij")
        module.pos_embedding[0, TEXT:, :3] = torch.stack(axes, dim=-1).flatten(0, 2)
        found = module.position_embedding_forward(None, **inputs(2, 4, 2))
    assert found.shape == (1, TEXT + 16, 16)
    assert torch.equal(found[:, :TEXT], module.pos_embedding[:, :TEXT])
    t, y, x = found[0, TEXT:, :3].reshape(2, 4, 2, 3).unbind(dim=3)
    torch.testing.assert_close(t, torch.tensor([0.0, 1.0])[:, None, None].expand(2, 4, 2))
    assert (y[:, 1:] > y[:, :-1]).all() and (x[:, :, 1] > x[:, :, 0]).all()
    torch.testing.assert_close((y[0], x[0]), (y[1], x[1]))


def test_it_is_resized_as_our_own_engine_does() -> None:
    from sat_ext.models.transformer import LearnedPatchEmbed

    module = embedding(learnable_pos_embed=True)
    own = LearnedPatchEmbed(
        embed_dim=16, text_embed_dim=4, sample_width=8, sample_height=4, sample_frames=9, max_text_seq_length=TEXT,
        in_channels=2, use_learned_positional_embeddings=True,
    )  # fmt: skip
    own.pos_embedding = own.pos_embedding.float()  # diffusers makes it in double precision
    own.pos_embedding.copy_(module.pos_embedding.detach())
    found = module.position_embedding_forward(None, **inputs(2, 5, 3))
    torch.testing.assert_close(found[:, TEXT:], own.positions(2, 5, 3))


def test_gradients_reach_the_learned_embedding_of_the_frames_that_are_there() -> None:
    module = embedding(learnable_pos_embed=True)
    module.position_embedding_forward(None, **inputs(2, 3, 3)).sum().backward()
    gradient = module.pos_embedding.grad[0, TEXT:].reshape(3, 8, 16)
    assert (gradient[:2] != 0).any(dim=2).all() and not gradient[2].any()


def test_more_frames_than_were_learned_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        embedding(learnable_pos_embed=True).position_embedding_forward(None, **inputs(4, 2, 4))
    assert str(error.value) == (
        "data.params.buckets.frames: a batch has 4 latent frames and the model's learned position embedding 3; "
        "leave out what is longer than model.network_config.params.num_frames."
    )


def test_a_size_that_does_not_divide_into_patches_is_refused() -> None:
    module = embedding(learnable_pos_embed=True)
    with pytest.raises(ConfigError) as error:
        module.position_embedding_forward(None, images=torch.empty(1, 1, 5, 7, 8), seq_length=14)
    assert str(error.value) == (
        "data.params.buckets.sizes: latents of 7x8 do not divide into patches of 2; use heights and widths that "
        "are multiples of 16 pixels."
    )


def test_a_model_without_a_learned_embedding_stays_without() -> None:
    assert embedding().position_embedding_forward(None, **inputs(2, 3, 3)) is None


def test_weights_keep_their_names_and_their_class() -> None:
    module = embedding(learnable_pos_embed=True)
    assert set(module.state_dict()) == {"freqs_cos", "freqs_sin", "pos_embedding"}
    assert isinstance(module, Rotary10) and isinstance(module, InterpolatedRotaryPositionEmbedding)


@pytest.mark.parametrize(
    "params, message",
    [
        (
            {"rotary": "crop"},
            f"{WHERE}.rotary: 'crop' is not one of stretch, count.",
        ),
        (
            {"learnable_pos_embd": True},
            f"{WHERE}: unknown key 'learnable_pos_embd'; did you mean 'learnable_pos_embed'?",
        ),
    ],
)
def test_a_wrong_option_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        embedding(**params)
    assert str(error.value) == message


def test_a_parent_of_another_sort_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        embedding(Last)
    assert str(error.value) == (
        f"{WHERE}.parent: {__name__}.Last has no rotary, so InterpolatedRotaryPositionEmbedding cannot extend "
        "it; name the class that CogVideo's own YAML has there."
    )


def sines(**params: Any) -> Any:
    return SinusoidalPositionEmbedding(parent=name_of(Sines), text_length=TEXT, **(SIZE | params))


def test_sines_are_the_parents_at_the_configured_size() -> None:
    module = sines()
    for frames in (1, 2, 3):
        found = module.position_embedding_forward(None, **inputs(frames, 2, 4))
        assert torch.equal(found, module.pos_embedding[:, : TEXT + 8 * frames])


def test_sines_of_another_size_are_those_of_diffusers() -> None:
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    module = sines(height_interpolation=1.875, width_interpolation=1.875)
    found = module.position_embedding_forward(None, **inputs(2, 5, 3))
    theirs = get_3d_sincos_pos_embed(16, (3, 5), 2, 1.875, 1.0, output_type="pt").flatten(0, 1).float()
    assert torch.equal(found[:, :TEXT], module.pos_embedding[:, :TEXT])
    torch.testing.assert_close(found[0, TEXT:], theirs)


def test_sines_take_each_axis_own_scale() -> None:
    module = sines(height_interpolation=2.0, width_interpolation=4.0, time_interpolation=0.5)
    found = module.position_embedding_forward(None, **inputs(4, 3, 5))[0, TEXT:].reshape(4, 3, 5, 16)
    # of 16 channels 4 are the frame's, 6 the column's and 6 the row's; each starts with the sine of the coordinate
    expected = torch.tensor([3 / 0.5, 4 / 4.0, 2 / 2.0]).sin()
    torch.testing.assert_close(found[3, 2, 4, [0, 4, 10]], expected)


def test_the_final_layer_puts_patches_together_at_the_inputs_size() -> None:
    module = FinalLayer(parent=name_of(Last), patch_size=2, latent_width=8, latent_height=4)
    latents = torch.arange(2 * 6 * 4.0).reshape(1, 2, 1, 6, 4)
    tokens = latents.reshape(1, 2, 3, 2, 2, 2).transpose(3, 4).reshape(1, 12, 4)
    logits = torch.cat([torch.zeros(1, TEXT, 4), tokens], dim=1)
    assert torch.equal(module.final_forward(logits, images=latents, text_length=TEXT), latents)
    assert isinstance(module, Last)
