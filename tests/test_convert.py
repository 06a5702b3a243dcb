"""Weights of every generation, in both layouts, there and back."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from sat_ext.convert import files
from sat_ext.convert.convert import convert
from sat_ext.convert.parts import ConvertOptions as Options
from sat_ext.errors import ConfigError
from tests.sat_layout import AUTOENCODER, FAMILIES, SIZE, sat_autoencoder, sat_transformer, write_sat

TINY = Options(size=SIZE)


def to_diffusers(source: Path, target: Path, options: Options = TINY) -> dict[str, Tensor]:
    """Convert, and give the transformer's tensors."""
    convert(source, target, "diffusers", ("transformer",), options)
    return files.read_safetensors(target / "transformer")


def to_sat(source: Path, target: Path) -> dict[str, Tensor]:
    convert(source, target, "sat", ("transformer",), Options())
    return sat_file(target / "transformer")


def sat_file(folder: Path) -> dict[str, Tensor]:
    name = folder / (folder / "latest").read_text() / "mp_rank_00_model_states.pt"
    weights: dict[str, Tensor] = torch.load(name, weights_only=True)["module"]
    return weights


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, dtypes included."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_sat_to_diffusers_and_back_is_the_same_bit_for_bit(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = sat_transformer(family, dtype)
    write_sat(tmp_path / "sat" / "transformer", weights)
    between = to_diffusers(tmp_path / "sat", tmp_path / "diffusers")
    assert {t.dtype for t in between.values()} == {dtype}
    _, loading = CogVideoXTransformer3DModel.from_pretrained(
        tmp_path / "diffusers" / "transformer", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_same(to_sat(tmp_path / "diffusers", tmp_path / "back"), weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_to_sat_and_back_is_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(**FAMILIES[family]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "own" / "transformer")
    own = load_file(tmp_path / "own" / "transformer" / "diffusion_pytorch_model.safetensors")
    made = to_sat(tmp_path / "own", tmp_path / "sat")
    assert made.keys() == sat_transformer(family, torch.bfloat16).keys()
    assert_same(to_diffusers(tmp_path / "sat", tmp_path / "back", Options()), own)
    config = json.loads((tmp_path / "back" / "transformer" / "config.json").read_text())
    assert config == json.loads((tmp_path / "own" / "transformer" / "config.json").read_text())
    assert not (tmp_path / "back" / "transformer" / "sat_only.safetensors").exists()  # all can be made again


def test_what_the_shapes_show_makes_the_config(tmp_path: Path) -> None:
    for family, sizes in FAMILIES.items():
        write_sat(tmp_path / family, sat_transformer(family))
        to_diffusers(tmp_path / family, tmp_path / f"{family}-out")
        config = json.loads((tmp_path / f"{family}-out" / "transformer" / "config.json").read_text())
        left = {"max_text_seq_length": 226, "patch_bias": "patch_size_t" not in sizes}
        assert {name: config[name] for name in sizes} == sizes | {n: v for n, v in left.items() if n in sizes}


def test_q_k_v_and_the_modulation_are_split_in_the_order_of_the_networks(tmp_path: Path) -> None:
    weights = sat_transformer("2b")
    layer, modulation = (
        "transformer.layers.1.attention.query_key_value",
        "mixins.adaln_layer.adaLN_modulations.1.1",
    )
    prefix = "model.diffusion_model."
    weights[f"{prefix}{layer}.bias"] = torch.arange(3.0).repeat_interleave(32)
    weights[f"{prefix}{modulation}.bias"] = torch.arange(12.0).repeat_interleave(32)
    write_sat(tmp_path / "sat", weights)
    found = to_diffusers(tmp_path / "sat", tmp_path / "out")
    block = "transformer_blocks.1"
    assert [found[f"{block}.attn1.to_{n}.bias"].unique().tolist() for n in "qkv"] == [[0], [1], [2]]
    # SAT: the video's attention and feed-forward (shift, scale, gate each), then the text's; diffusers: by layer
    order = [found[f"{block}.norm{k}.linear.bias"][::32].tolist() for k in (1, 2)]
    assert order == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


@pytest.mark.parametrize("wrapped", [True, False], ids=["state_dict", "flat"])
def test_the_autoencoder_there_and_back(wrapped: bool, tmp_path: Path) -> None:
    weights = sat_autoencoder() | {"loss.discriminator.weight": torch.randn(3)}  # of its training; kept aside
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "3d-vae.pt")
    convert(tmp_path, tmp_path / "out", "diffusers", ("vae",), Options(scale_factor=0.7))
    model, loading = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "out" / "vae", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.scaling_factor == 0.7
    assert {name: model.config[name] for name in AUTOENCODER} == AUTOENCODER
    # diffusers counts the decoder's levels from the coarsest
    assert torch.equal(
        model.decoder.up_blocks[0].resnets[0].conv1.conv.bias, weights["decoder.up.3.block.0.conv1.conv.bias"]
    )
    convert(tmp_path / "out", tmp_path / "back", "sat", ("vae",), Options())
    assert_same(torch.load(tmp_path / "back" / "vae" / "3d-vae.pt", weights_only=True)["state_dict"], weights)


def test_diffusers_autoencoder_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    kinds = {f"{k}_block_types": (f"CogVideoX{k.title()}Block3D",) * 4 for k in ("down", "up")}
    model = AutoencoderKLCogVideoX(**AUTOENCODER, **kinds, scaling_factor=0.9).half()
    model.save_pretrained(tmp_path / "own" / "vae")
    convert(tmp_path / "own", tmp_path / "sat", "sat", ("transformer", "vae"), Options())
    convert(tmp_path / "sat", tmp_path / "back", "diffusers", ("transformer", "vae"), Options())
    name = "diffusion_pytorch_model.safetensors"
    assert_same(load_file(tmp_path / "back" / "vae" / name), load_file(tmp_path / "own" / "vae" / name))
    assert json.loads((tmp_path / "back" / "vae" / "config.json").read_text())["scaling_factor"] == 0.9


def test_both_parts_of_a_published_folder_are_converted(tmp_path: Path) -> None:
    write_sat(tmp_path / "sat" / "transformer", sat_transformer("5b-i2v"))
    (tmp_path / "sat" / "vae").mkdir()
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "sat" / "vae" / "3d-vae.pt")
    options = Options(size=SIZE, scale_factor=0.7)
    done = convert(tmp_path / "sat", tmp_path / "out", "diffusers", ("transformer", "vae"), options)
    assert done.written == [tmp_path / "out" / "transformer", tmp_path / "out" / "vae"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["transformer", "vae"]


def test_a_whole_checkpoint_gives_its_transformer_and_its_autoencoder(tmp_path: Path) -> None:
    """CogVideo's own checkpoints hold the first stage and the text encoder too."""
    own = sat_transformer("2b")
    first = {f"first_stage_model.{n}": t for n, t in sat_autoencoder().items()}
    write_sat(tmp_path / "run", own | first | {"conditioner.embedders.0.t5.weight": torch.zeros(2)})
    done = convert(tmp_path / "run", tmp_path / "out", "diffusers", ("transformer",), TINY)
    assert done.left_out == ("conditioner", "first_stage_model")
    assert_same(to_sat(tmp_path / "out", tmp_path / "back"), own)
    file = tmp_path / "run" / "1" / "mp_rank_00_model_states.pt"
    convert(file, tmp_path / "vae", "diffusers", ("vae",), Options(scale_factor=0.7))
    convert(tmp_path / "vae", tmp_path / "vae-sat", "sat", ("vae",), Options())
    back = torch.load(tmp_path / "vae-sat" / "vae" / "3d-vae.pt", weights_only=True)["state_dict"]
    assert_same(back, sat_autoencoder())


def test_positions_of_other_rounding_are_kept(tmp_path: Path) -> None:
    """Sines that another machine computed differ in the last bit, and come back as they were."""
    weights = sat_transformer("5b")
    sines = weights["model.diffusion_model.mixins.pos_embed.freqs_sin"]
    sines[3] = torch.nextafter(sines[3], torch.tensor(2.0))
    write_sat(tmp_path / "sat", weights)
    to_diffusers(tmp_path / "sat", tmp_path / "out")
    kept = load_file(tmp_path / "out" / "transformer" / "sat_only.safetensors")
    assert kept.keys() == {"mixins.pos_embed.freqs_sin", "transformer.position_embeddings.weight"}
    assert_same(to_sat(tmp_path / "out", tmp_path / "back"), weights)


def test_large_weights_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sat_ext.convert.files.SHARD_BYTES", 200_000)
    weights = sat_transformer("1.5-5b-i2v")
    write_sat(tmp_path / "sat", weights)
    to_diffusers(tmp_path / "sat", tmp_path / "out")
    folder = tmp_path / "out" / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(s.stat().st_size < 250_000 for s in shards if "sat_only" not in s.name)
    _, loading = CogVideoXTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert_same(to_sat(tmp_path / "out", tmp_path / "back"), weights)


def test_tensors_that_share_their_memory_are_saved_alone(tmp_path: Path) -> None:
    """DeepSpeed's files hold views of flat buffers, each of which would be saved with the whole buffer."""
    flat = torch.arange(1e6)
    weights = {"a": flat[:10], "b": torch.cat([flat[10:20], flat[:10]]), "c": flat[:10].view(2, 5).T}
    files.write_checkpoint(tmp_path / "a.pt", "module", weights, "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    found = torch.load(tmp_path / "a.pt", weights_only=True)["module"]
    assert found["a"].tolist() == list(range(10))
    assert found["b"].tolist() == [*range(10, 20), *range(10)]
    assert torch.equal(found["c"], weights["c"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


BASE: dict[str, Any] = {
    "model": {
        "scale_factor": 0.7,
        "network_config": {
            "params": {
                "num_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "in_channels": 32,
                "out_channels": 16, "time_embed_dim": 32, "ofs_embed_dim": 32, "patch_size": [2, 2, 2],
                "num_frames": 81, "latent_height": 300, "latent_width": 300,
                "modules": {
                    "pos_embed_config": {"params": {"text_length": 224}},
                    "patch_embed_config": {"params": {"text_hidden_size": 32}},
                },
            },
        },
    },
}  # fmt: skip


def test_cogvideos_yaml_gives_the_size(tmp_path: Path) -> None:
    write_sat(tmp_path / "sat" / "transformer", sat_transformer("1.5-5b-i2v"))
    (tmp_path / "sat" / "vae").mkdir()
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "sat" / "vae" / "3d-vae.pt")
    convert(tmp_path / "sat", tmp_path / "out", "diffusers", ("transformer", "vae"), Options(base=BASE))
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    names = ("sample_height", "sample_width", "sample_frames", "max_text_seq_length", "patch_size_t")
    assert [config[name] for name in names] == [300, 300, 81, 224, 2]
    autoencoder = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())
    assert (autoencoder["scaling_factor"], autoencoder["invert_scale_latents"]) == (0.7, True)


def test_the_yaml_tells_how_a_linear_patch_is_shared_out(tmp_path: Path) -> None:
    """Of CogVideo's main branch with a temporal patch of 1, which has the tensors of one with fewer channels."""
    weights = sat_transformer("1.5-5b-i2v")
    for name in ("patch_embed.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"):
        tensor = weights[f"model.diffusion_model.mixins.{name}"]
        half = tensor[:, : tensor.shape[1] // 2] if "patch_embed" in name else tensor[: len(tensor) // 2]
        weights[f"model.diffusion_model.mixins.{name}"] = half.contiguous()
    write_sat(tmp_path / "sat", weights)
    base = deepcopy(BASE)
    base["model"]["network_config"]["params"]["patch_size"] = [1, 2, 2]
    to_diffusers(tmp_path / "sat", tmp_path / "out", Options(base=base))
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert [config[name] for name in ("patch_size_t", "in_channels", "out_channels")] == [1, 32, 16]
    assert_same(to_sat(tmp_path / "out", tmp_path / "back"), weights)


def test_a_config_json_that_leaves_out_what_came_later_converts(tmp_path: Path) -> None:
    """As the published 1.0 models', older than diffusers' `patch_size_t` and the like."""
    CogVideoXTransformer3DModel(**FAMILIES["5b"]).save_pretrained(tmp_path / "own" / "transformer")
    file = tmp_path / "own" / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for later in ("patch_size_t", "patch_bias", "ofs_embed_dim", "use_learned_positional_embeddings"):
        del config[later]
    file.write_text(json.dumps(config | {"_diffusers_version": "0.30.0"}))
    made = to_sat(tmp_path / "own", tmp_path / "sat")
    assert made.keys() == sat_transformer("5b").keys()
    kept = json.loads((tmp_path / "sat" / "transformer" / "config.json").read_text())
    assert {name: kept[name] for name in config} == config | {"_diffusers_version": "0.30.0"}


def test_a_scale_of_nothing_is_not_taken_for_no_scale(tmp_path: Path) -> None:
    torch.save({"state_dict": sat_autoencoder()}, tmp_path / "3d-vae.pt")
    options = Options(base=BASE, scale_factor=0.0)
    with pytest.raises(ConfigError, match=r"3d-vae.pt: scaling_factor is 0.0, which no model can have"):
        convert(tmp_path, tmp_path / "out", "diffusers", ("vae",), options)
