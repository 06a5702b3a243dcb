"""LoRA of both engines: what diffusers loads does what the run's own network did."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat_ext.convert.convert import convert, export
from sat_ext.convert.parts import ConvertOptions as Options
from sat_ext.errors import ConfigError
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.packs import Group, PackedTransformer
from tests.sat_layout import AUTOENCODER, FAMILIES, HIDDEN, LAYERS, SIZE, sat_transformer, write_sat
from tests.test_convert import assert_same, sat_file

RANK, ALPHA = 4, 6.0
PREFIX = "model.diffusion_model."
ATTENTION = PREFIX + "transformer.layers.{}.attention."
NETWORK: dict[str, Any] = {
    "num_layers": LAYERS, "num_attention_heads": 2, "hidden_size": HIDDEN, "in_channels": 16, "out_channels": 16,
    "time_embed_dim": 32, "patch_size": 2, "num_frames": SIZE.frames, "latent_height": 8, "latent_width": 8,
    "modules": {
        "pos_embed_config": {"params": {"text_length": 226}},
        "patch_embed_config": {"params": {"text_hidden_size": 32}},
    },
}  # fmt: skip
# The last has a convolution.
TARGETS = [
    "attention",
    "all-linear",
    ["to_v", "ff.net.2"],
    ["patch_embed", "time_embedding", "norm_out", "proj_out"],
]
VARIANTS = [[], ["rslora"], ["dora"], ["rslora", "dora"]]
LORA_FILE = "pytorch_lora_weights.safetensors"


def sat_lora(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The matrices of lora2: three pairs for the stacked q, k, v, and one for the output."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for i in range(LAYERS):
        for layer, count in (("query_key_value", 3), ("dense", 1)):
            for k in range(count):
                name = ATTENTION.format(i) + layer
                weights[f"{name}.matrix_A.{k}"] = torch.randn(RANK, HIDDEN, generator=generator).to(dtype)
                weights[f"{name}.matrix_B.{k}"] = torch.randn(HIDDEN, RANK, generator=generator).to(dtype)
    return weights


def as_upstream(base: dict[str, Tensor], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Base and LoRA in one file, as CogVideo's own: what is adapted stands under `original`."""
    return {re.sub(r"(query_key_value|attention\.dense)\.", r"\1.original.", n): t for n, t in base.items()} | lora


def merged(base: dict[str, Tensor], lora: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The base with alpha / rank * B @ A added, q, k and v in turn: what the adapted network computes."""
    weights = dict(base)
    for i in range(LAYERS):
        for layer, count in (("query_key_value", 3), ("dense", 1)):
            name = ATTENTION.format(i) + layer
            added = [lora[f"{name}.matrix_B.{k}"] @ lora[f"{name}.matrix_A.{k}"] for k in range(count)]
            weights[f"{name}.weight"] = base[f"{name}.weight"] + alpha / RANK * torch.cat(added)
    return weights


def write_run(folder: Path, weights: dict[str, Tensor], alpha: float | None = ALPHA) -> Path:
    """A run of CogVideo's, with the YAML that SAT writes beside it."""
    write_sat(folder, weights)
    network = deepcopy(NETWORK)
    network["modules"]["lora_config"] = {"params": {"r": RANK} | ({} if alpha is None else {"lora_alpha": alpha})}
    network["in_channels"] = weights.get(f"{PREFIX}mixins.patch_embed.proj.weight", torch.zeros(1, 16)).shape[1]
    learned = f"{PREFIX}mixins.pos_embed.pos_embedding" in weights
    network["modules"]["pos_embed_config"]["params"]["learnable_pos_embed"] = learned
    config = {"model": {"network_config": {"params": network}}}
    (folder / "training_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def from_sat(folder: Path, weights: dict[str, Tensor]) -> CogVideoXTransformer3DModel:
    """diffusers' model of SAT's weights."""
    write_sat(folder / "sat", weights)
    convert(folder / "sat", folder / "out", "diffusers", ("transformer",), Options(size=SIZE))
    return CogVideoXTransformer3DModel.from_pretrained(folder / "out" / "transformer")


def with_lora(model: CogVideoXTransformer3DModel, folder: Path) -> CogVideoXTransformer3DModel:
    """The model after a pipeline's `load_lora_weights`."""
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=None)
    pipeline.load_lora_weights(str(folder))
    return pipeline.transformer


@torch.no_grad()
def output(model: CogVideoXTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(1, 3, model.config.in_channels, 8, 8, generator=generator)
    text = torch.randn(1, model.config.max_text_seq_length, model.config.text_embed_dim, generator=generator)
    angles = torch.rand(3 * 4 * 4, 16, generator=generator)
    rotary = (angles.cos(), angles.sin())
    if isinstance(model, PackedTransformer):
        (ours,) = model([Group(latents=latents, text=text, timesteps=torch.tensor([500]), rotary=rotary)])
        return ours
    found: Tensor = model(latents, text, torch.tensor([500]), image_rotary_emb=rotary)[0]
    return found


@pytest.mark.parametrize("layout", ["base and lora", "lora alone"])
@pytest.mark.parametrize("alpha", [ALPHA, None], ids=["alpha 6", "alpha unsaid"])
def test_an_exported_lora_of_cogvideos_does_in_diffusers_what_its_merged_weights_do(
    layout: str, alpha: float | None, tmp_path: Path
) -> None:
    base, lora = sat_transformer("5b"), sat_lora()
    run = write_run(tmp_path / "run", as_upstream(base, lora) if layout == "base and lora" else lora, alpha)
    done = export(run, tmp_path / "lora", Options())
    assert done.written == [tmp_path / "lora" / LORA_FILE]
    found = output(with_lora(from_sat(tmp_path / "base", base), tmp_path / "lora"))
    expected = output(from_sat(tmp_path / "merged", merged(base, lora, 1.0 if alpha is None else alpha)))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, output(from_sat(tmp_path / "plain", base)), atol=0.01)


def test_a_lora_on_some_layers_names_them_in_full(tmp_path: Path) -> None:
    lora = {n: t for n, t in sat_lora().items() if ".layers.1." in n}
    base = sat_transformer("5b")
    export(write_run(tmp_path / "run", as_upstream(base, lora)), tmp_path / "lora", Options())
    model = with_lora(from_sat(tmp_path / "base", base), tmp_path / "lora")
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == [f"transformer_blocks.1.attn1.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_and_lora_go_to_diffusers_and_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = as_upstream(sat_transformer("5b-i2v", dtype), sat_lora(dtype))
    run = write_run(tmp_path / "run", weights)
    convert(run, tmp_path / "out", "diffusers", ("transformer",), Options(size=SIZE, alpha=ALPHA))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [LORA_FILE, "transformer"]
    convert(tmp_path / "out", tmp_path / "back", "sat", ("transformer",), Options())
    folder = tmp_path / "back" / "transformer"
    assert_same(sat_file(folder), weights)
    section = yaml.safe_load((folder / "lora.yaml").read_text())["model"]["network_config"]["params"]["modules"]
    assert section["lora_config"]["params"] == {"r": RANK, "lora_alpha": ALPHA}
    # and the LoRA's file again from that, its alpha too
    convert(tmp_path / "back", tmp_path / "again", "diffusers", ("transformer",), Options())
    for name in (LORA_FILE, "transformer/diffusion_pytorch_model.safetensors"):
        assert_same(load_file(tmp_path / "again" / name), load_file(tmp_path / "out" / name))
    again, out = (safe_open(tmp_path / name / LORA_FILE, framework="pt").metadata() for name in ("again", "out"))
    assert again == out and "lora_adapter_metadata" in out


def engine_run(folder: Path, model: dict[str, Any]) -> VideoDiffusionEngine:
    """A run of the built-in engine, its LoRA as if it had trained."""
    torch.manual_seed(5)
    engine = VideoDiffusionEngine(SimpleNamespace(model_config=model, seed=1))
    for name, parameter in engine.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
        elif "magnitude" in name:
            with torch.no_grad():
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    write_sat(folder, engine.state_dict())
    (folder / "training_config.yaml").write_text(yaml.safe_dump({"model": model}))
    return engine.eval()


def lora_of(targets: Any, variant: list[str]) -> dict[str, Any]:
    return {"mode": "lora", "rank": RANK, "alpha": 3, "target_modules": targets, **dict.fromkeys(variant, True)}


def small_model(**changes: Any) -> dict[str, Any]:
    sizes = FAMILIES["5b"]
    return {"first_stage": {"kind": "cosine"}, "text": {"kind": "byt5"}, "transformer": sizes, **changes}


def pretrained(folder: Path) -> Path:
    """A model's folder with what the built-in engine reads of it when it exports."""
    torch.manual_seed(6)
    CogVideoXTransformer3DModel(**FAMILIES["5b"]).save_pretrained(folder / "transformer")
    kinds = {f"{k}_block_types": (f"CogVideoX{k.title()}Block3D",) * 4 for k in ("down", "up")}
    AutoencoderKLCogVideoX(**AUTOENCODER, **kinds).save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_an_exported_lora_of_the_built_in_engine_does_the_same_in_diffusers(
    targets: Any, variant: list[str], tmp_path: Path
) -> None:
    train = lora_of(targets, variant)
    engine = engine_run(tmp_path / "run", small_model(train=train))
    done = export(tmp_path / "run", tmp_path / "out", Options())
    # no folder holds the base of a model that began with random weights, so it goes along
    assert done.written == [tmp_path / "out" / "transformer", tmp_path / "out" / LORA_FILE]
    model = with_lora(
        CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer"), tmp_path / "out"
    )
    assert torch.allclose(output(model), output(engine.network), atol=1e-5)
    ours, theirs = engine.network.peft_config["default"], model.peft_config["default_0"]
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        assert getattr(theirs, name) == getattr(ours, name), name
    adapted = [{n for n, m in of.named_modules() if hasattr(m, "lora_A")} for of in (engine.network, model)]
    assert adapted[0] == adapted[1] == set(theirs.target_modules)


def test_a_lora_of_the_built_in_engine_goes_to_sat_with_the_weights_of_its_folder(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model")
    # what such a run saves: the adapters alone
    lora = {}
    for i in range(LAYERS):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            layer = f"network.transformer_blocks.{i}.attn1.{name}"
            lora[f"{layer}.lora_A.default.weight"] = torch.randn(RANK, HIDDEN)
            lora[f"{layer}.lora_B.default.weight"] = torch.randn(HIDDEN, RANK)
    write_sat(tmp_path / "run", lora)
    model = {"pretrained": str(folder), "train": {"mode": "lora", "rank": RANK, "alpha": 3}}
    (tmp_path / "run" / "training_config.yaml").write_text(yaml.safe_dump({"model": model}))
    done = export(tmp_path / "run", tmp_path / "lora", Options())
    assert done.written == [tmp_path / "lora" / LORA_FILE]
    convert(tmp_path / "run", tmp_path / "sat", "sat", ("transformer",), Options())
    found = sat_file(tmp_path / "sat" / "transformer")
    name = ATTENTION.format(1) + "query_key_value."
    assert torch.equal(
        found[f"{name}matrix_A.2"], lora["network.transformer_blocks.1.attn1.to_v.lora_A.default.weight"]
    )
    own = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    parts = [own[f"transformer_blocks.1.attn1.to_{n}.weight"] for n in "qkv"]
    assert torch.equal(found[f"{name}original.weight"], torch.cat(parts))


def test_a_full_run_exports_its_transformer(tmp_path: Path) -> None:
    engine = engine_run(tmp_path / "run", small_model())
    done = export(tmp_path / "run", tmp_path / "out", Options())
    assert done.written == [tmp_path / "out" / "transformer"] and done.lora is None
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert_same(model.state_dict(), engine.network.state_dict())


def test_what_is_wrong_with_a_lora_is_one_sentence(tmp_path: Path) -> None:
    lora = sat_lora()
    write_sat(tmp_path / "bare", lora)
    with pytest.raises(
        ConfigError, match="SAT keeps the scale of a LoRA in the YAML; give .* or its lora_alpha with --alph"
    ):
        export(tmp_path / "bare", tmp_path / "out", Options())
    with pytest.raises(
        ConfigError, match="holds a LoRA and not the weights that it belongs to; name their folder with"
    ):
        convert(tmp_path / "bare", tmp_path / "out", "sat", ("transformer",), Options(alpha=1))
    write_sat(tmp_path / "half", {n: t for n, t in lora.items() if "0.attention.dense.matrix_B" not in n})
    with pytest.raises(
        ConfigError, match=r"transformer.layers.0.attention.dense.matrix_B.0 is missing; copy or downl"
    ):
        export(tmp_path / "half", tmp_path / "out", Options(alpha=1))
    moved = {n.replace("attention.dense", "mlp.dense_h_to_4h"): t for n, t in lora.items()}
    write_sat(tmp_path / "moved", moved)
    with pytest.raises(
        ConfigError, match=r"4 LoRA matrices have no place \(first: transformer.layers.0.mlp.dense_h_to_4h.mat"
    ):
        export(tmp_path / "moved", tmp_path / "out", Options(alpha=1))
    assert not (tmp_path / "out").exists()


def test_a_lora_that_sat_cannot_have_is_refused(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model")
    pair = {"A": torch.randn(RANK, HIDDEN), "B": torch.randn(4 * HIDDEN, RANK)}
    name = "transformer.transformer_blocks.0.ff.net.0.proj.lora_{}.weight"
    save_file({name.format(letter): t for letter, t in pair.items()}, folder / LORA_FILE)
    with pytest.raises(
        ConfigError, match=r"2 LoRA matrices have no place \(first: transformer_blocks.0.ff.net.0.proj.lora_A"
    ):
        convert(folder, tmp_path / "out", "sat", ("transformer",), Options())
    save_file({"unet.lora_A.weight": pair["A"]}, folder / LORA_FILE)
    with pytest.raises(
        ConfigError, match="holds unet.lora_A.weight, not a transformer's LoRA; name the file of a Cog"
    ):
        convert(folder, tmp_path / "out", "sat", ("transformer",), Options())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{oops", "its lora_adapter_metadata is '{oops', not what diffusers writes (Expecting property name"),
        ("[1]", "its lora_adapter_metadata is '[1]', not what diffusers writes ('list' object has no attribute"),
        ('{"transformer.lora_alpha": "x"}', 'alpha": "x"}\', not what diffusers writes (could not convert'),
        (
            '{"transformer.lora_alpha": null}',
            "alpha\": null}', not what diffusers writes (float() argument",
        ),
    ],
)
def test_metadata_of_a_lora_that_is_none_is_one_sentence(metadata: str, message: str, tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    pair = {"A": torch.randn(RANK, HIDDEN), "B": torch.randn(HIDDEN, RANK)}
    file = tmp_path / LORA_FILE
    save_file({name.format(k): t for k, t in pair.items()}, file, {"lora_adapter_metadata": metadata})
    with pytest.raises(
        ConfigError, match=f"^{re.escape(str(file))}: .*{re.escape(message)}.*; copy or download it"
    ):
        convert(file, tmp_path / "out", "sat", ("transformer",), Options())


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_the_alpha_that_is_given_wins_whatever_it_is(alpha: float, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", sat_lora())
    done = export(run, tmp_path / "lora", Options(alpha=alpha))
    assert done.lora is not None and done.lora.alpha == alpha
    engine_run(tmp_path / "engine", small_model(train={"mode": "lora", "rank": RANK, "alpha": 3}))
    for source in (tmp_path / "engine", tmp_path / "lora" / LORA_FILE):
        done = export(source, tmp_path / source.stem / "out", Options(alpha=alpha))
        assert done.lora is not None and done.lora.alpha == alpha
