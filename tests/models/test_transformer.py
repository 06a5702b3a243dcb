from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import CogVideoXPatchEmbed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from safetensors.torch import load_file

from sat_ext.errors import ConfigError
from sat_ext.models.folder import load_model_config
from sat_ext.models.transformer import LearnedPatchEmbed, build_transformer, rotary_embedding
from tests.models.conftest import FAMILIES, small_config

CPU = torch.device("cpu")


def learned_pair() -> tuple[LearnedPatchEmbed, CogVideoXPatchEmbed]:
    """Ours and diffusers' own, with the same weights and a position embedding that no formula gives."""
    torch.manual_seed(0)
    ours = build_transformer(load_model_config(small_config("5b-i2v")), torch.float32).patch_embed
    theirs = CogVideoXTransformer3DModel(**FAMILIES["5b-i2v"]["transformer"]).patch_embed
    assert isinstance(ours, LearnedPatchEmbed)
    ours.pos_embedding.normal_()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_learned_positions_at_native_size_are_diffusers() -> None:
    ours, theirs = learned_pair()
    text, latents = torch.randn(2, 8, 32), torch.randn(2, 3, 32, 8, 8)
    torch.testing.assert_close(ours(text, latents), theirs(text, latents))


def test_fewer_frames_take_the_first_learned_positions() -> None:
    ours, _ = learned_pair()
    whole = ours.positions(3, 4, 4)
    assert torch.equal(whole, ours.pos_embedding[:, 8:])
    assert torch.equal(ours.positions(1, 4, 4), whole[:, : 4 * 4])
    text, latents = torch.randn(1, 8, 32), torch.randn(1, 1, 32, 8, 8)
    native = ours(text, latents.expand(-1, 3, -1, -1, -1))
    torch.testing.assert_close(ours(text, latents), native[:, : 8 + 16])


def test_other_sizes_take_resized_learned_positions() -> None:
    ours, theirs = learned_pair()
    rows = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, 32)  # grows downwards
    ours.pos_embedding[:, 8:] = rows.expand(3, 4, 4, 32).flatten(0, 2)
    resized = ours.positions(2, 6, 3).reshape(2, 6, 3, 32)
    torch.testing.assert_close(resized[0], resized[1])
    torch.testing.assert_close(resized[:, :, :1].expand(-1, -1, 3, -1), resized)
    assert (resized[0, 1:, 0, 0] > resized[0, :-1, 0, 0]).all()
    latents = torch.randn(1, 2, 32, 12, 6)
    assert ours(torch.randn(1, 8, 32), latents).shape == (1, 8 + 2 * 6 * 3, 32)
    with pytest.raises(ValueError, match="different resolution"):
        theirs(torch.randn(1, 8, 32), latents)  # why ours is there


@pytest.mark.parametrize("family", ["5b", "1.5-5b"])
@pytest.mark.parametrize("size", [(8, 8), (12, 6), (4, 10)])
def test_rotary_embedding_is_the_pipelines(family: str, size: tuple[int, int]) -> None:
    config = load_model_config(small_config(family))
    pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
    pipeline.transformer = CogVideoXTransformer3DModel(**FAMILIES[family]["transformer"])  # type: ignore[misc]
    pipeline.vae_scale_factor_spatial = 4
    for frames in (2, 4):
        if family == "1.5-5b" and max(size) > 8:
            continue  # the pipeline cannot go past the native grid; ours goes on counting, see below
        expected = pipeline._prepare_rotary_positional_embeddings(size[0] * 4, size[1] * 4, frames, CPU)
        found = rotary_embedding(config, frames, *size, CPU)
        assert found is not None
        torch.testing.assert_close(found, expected)


def test_rotary_embedding_counts_patches_in_1_5() -> None:
    config = load_model_config(small_config("1.5-5b"))
    small, large = rotary_embedding(config, 2, 4, 4, CPU), rotary_embedding(config, 2, 12, 12, CPU)
    assert small is not None and large is not None
    for part, whole in zip(small, large, strict=True):
        assert torch.equal(part.reshape(2, 2, 16), whole.reshape(6, 6, 16)[:2, :2])


def test_models_without_rotary_embedding_get_none() -> None:
    assert rotary_embedding(load_model_config(small_config("2b")), 3, 8, 8, CPU) is None


def test_new_models_start_with_identity_blocks() -> None:
    transformer = build_transformer(load_model_config(small_config("5b")), torch.float32)
    block = transformer.transformer_blocks[0]
    hidden, text, time = torch.randn(1, 16, 32), torch.randn(1, 8, 32), torch.randn(1, 32)
    after_text, after = block([None], time, text, hidden)
    assert torch.equal(after, hidden) and torch.equal(after_text, text)


def test_weights_of_the_folder_are_loaded_bit_for_bit(pretrained: Callable[..., Path]) -> None:
    folder = pretrained("5b-i2v")
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = load_model_config({"pretrained": str(folder), "conditioning": "i2v"})
    loaded = build_transformer(config, torch.float32).state_dict()
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():  # diffusers saves the position embedding in double precision
        assert torch.equal(value.float(), loaded[name]), name
    half = build_transformer(config, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_weights_come_from_safetensors_only(pretrained: Callable[..., Path], tmp_path: Path) -> None:
    folder = pretrained("5b-i2v")
    saved = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    saved.save_pretrained(tmp_path / "transformer", safe_serialization=False)  # a pickle
    for part in ("vae", "scheduler"):
        (tmp_path / part).symlink_to(folder / part)
    config = load_model_config({"pretrained": str(tmp_path), "conditioning": "i2v"})
    with pytest.raises(OSError, match="safetensors"):
        build_transformer(config, torch.float32)


def test_lora_targets_must_exist() -> None:
    changes = {"train": {"mode": "lora", "rank": 2, "target_modules": ["to_q", "to_x"]}}
    with pytest.raises(ConfigError, match=r"target_modules: no layer of the transformer is called 'to_x'"):
        build_transformer(load_model_config(small_config("5b", **changes)), torch.float32)


def test_gradient_checkpointing_is_turned_on() -> None:
    config = load_model_config(small_config("5b", gradient_checkpointing=True))
    assert build_transformer(config, torch.float32).gradient_checkpointing
