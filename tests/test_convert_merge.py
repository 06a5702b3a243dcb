"""A LoRA merged into its base, in both layouts: the weights compute what the adapted network did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from sat_ext.convert.convert import convert, export
from sat_ext.convert.parts import ConvertOptions as Options
from sat_ext.errors import ConfigError
from tests.sat_layout import HIDDEN, LAYERS, SIZE, sat_transformer, write_sat
from tests.test_convert import assert_same, sat_file
from tests.test_convert_lora import (
    ALPHA,
    LORA_FILE,
    RANK,
    TARGETS,
    VARIANTS,
    as_upstream,
    engine_run,
    lora_of,
    merged,
    output,
    pretrained,
    sat_lora,
    small_model,
    with_lora,
    write_run,
)

MERGE = Options(merge=True, size=SIZE)
PARTS = ("transformer",)


def loaded(folder: Path) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_merged_weights_of_the_built_in_engine_do_what_its_adapters_did(
    targets: Any, variant: list[str], tmp_path: Path
) -> None:
    engine = engine_run(tmp_path / "run", small_model(train=lora_of(targets, variant)))
    expected = output(engine.network)
    for to in ("diffusers", "sat"):
        done = convert(tmp_path / "run", tmp_path / to, to, PARTS, MERGE)  # type: ignore[arg-type]
        assert done.written == [tmp_path / to / "transformer"] and done.lora is None
    assert torch.allclose(output(loaded(tmp_path / "diffusers")), expected, atol=1e-4, rtol=1e-4)
    # SAT has every layer, under the names of a model that was tuned whole
    assert sat_file(tmp_path / "sat" / "transformer").keys() == sat_transformer("5b").keys()
    convert(tmp_path / "sat", tmp_path / "back", "diffusers", PARTS, Options())
    assert_same(loaded(tmp_path / "back").state_dict(), loaded(tmp_path / "diffusers").state_dict())


@pytest.mark.parametrize("base_in", ["diffusers", "sat"])
def test_a_loras_file_is_merged_into_a_base_of_either_layout(base_in: str, tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model")
    engine = engine_run(tmp_path / "run", small_model(train=lora_of("all-linear", ["dora"])))
    export(tmp_path / "run", tmp_path / "lora", Options())
    if base_in == "sat":
        convert(folder, tmp_path / "base", "sat", PARTS, Options())
    before = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    base = folder if base_in == "diffusers" else tmp_path / "base"
    file = tmp_path / "lora" / LORA_FILE
    options = Options(merge=True, base_weights=base)
    for to in ("diffusers", "sat"):
        convert(file, tmp_path / to, to, PARTS, options)  # type: ignore[arg-type]
    assert engine is not None
    expected = output(with_lora(loaded(folder), tmp_path / "lora"))
    assert torch.allclose(output(loaded(tmp_path / "diffusers")), expected, atol=1e-5)
    convert(tmp_path / "sat", tmp_path / "back", "diffusers", PARTS, Options())
    assert torch.allclose(output(loaded(tmp_path / "back")), expected, atol=1e-5)
    assert_same(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), before)


def test_cogvideos_own_lora_is_merged_into_the_layout_it_came_in(tmp_path: Path) -> None:
    base, lora = sat_transformer("5b"), sat_lora()
    run = write_run(tmp_path / "run", as_upstream(base, lora))
    convert(run, tmp_path / "out", "sat", PARTS, MERGE)
    found, expected = sat_file(tmp_path / "out" / "transformer"), merged(base, lora, ALPHA)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    base, lora = sat_transformer("5b", dtype), sat_lora(dtype)
    run = write_run(tmp_path / "run", as_upstream(base, lora))
    convert(run, tmp_path / "out", "sat", PARTS, MERGE)
    exact = merged({n: t.float() for n, t in base.items()}, {n: t.float() for n, t in lora.items()}, ALPHA)
    for name, tensor in sat_file(tmp_path / "out" / "transformer").items():
        assert tensor.dtype == dtype
        # added in this dtype: one rounding of the product, and one of the sum
        torch.testing.assert_close(tensor.float(), exact[name], rtol=2 * torch.finfo(dtype).eps, atol=0.02)


def test_the_scale_of_an_rslora_folds_into_sats_alpha(tmp_path: Path) -> None:
    engine = engine_run(tmp_path / "run", small_model(train=lora_of("attention", ["rslora"])))
    convert(tmp_path / "run", tmp_path / "sat", "sat", PARTS, Options())
    said = yaml.safe_load((tmp_path / "sat" / "transformer" / "lora.yaml").read_text())
    params = said["model"]["network_config"]["params"]["modules"]["lora_config"]["params"]
    assert params == {"r": RANK, "lora_alpha": 3 * RANK**0.5}
    convert(tmp_path / "sat", tmp_path / "back", "diffusers", PARTS, Options())
    found = output(with_lora(loaded(tmp_path / "back"), tmp_path / "back"))
    assert torch.allclose(found, output(engine.network), atol=1e-5)


def test_attention_layers_without_an_adapter_have_zeros_in_sat(tmp_path: Path) -> None:
    engine = engine_run(tmp_path / "run", small_model(train=lora_of(["to_v"], [])))
    convert(tmp_path / "run", tmp_path / "sat", "sat", PARTS, Options())
    weights = sat_file(tmp_path / "sat" / "transformer")
    assert {name for name in weights if ".matrix_" in name} == sat_lora().keys()
    assert sum(bool(weights[name].any()) for name in sat_lora()) == 2 * LAYERS
    convert(tmp_path / "sat", tmp_path / "back", "diffusers", PARTS, Options())
    found = output(with_lora(loaded(tmp_path / "back"), tmp_path / "back"))
    assert torch.allclose(found, output(engine.network), atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "variant", "message"),
    [
        (["to_q", "ff.net.2"], [], r"first: transformer_blocks.0.ff.net.2.lora_A.weight\); SAT's lora2 adapts"),
        (["norm1.linear"], ["rslora"], r"4 LoRA matrices have no place \(first: transformer_blocks.0.norm1"),
        (["patch_embed.proj"], [], r"first: patch_embed.proj.lora_A.weight\); .*; add it to the weights with"),
        ("attention", ["dora"], "lora2 has no DoRA, with which this LoRA was trained; add it to the weights with"),
    ],
)  # fmt: skip
def test_what_sats_lora_does_not_have_is_refused_by_name(
    targets: Any, variant: list[str], message: str, tmp_path: Path
) -> None:
    engine_run(tmp_path / "run", small_model(train=lora_of(targets, variant)))
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "run", tmp_path / "sat", "sat", PARTS, Options())
    assert not (tmp_path / "sat").exists()


def test_what_cannot_be_merged_is_one_sentence(tmp_path: Path) -> None:
    folder = pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--merge: .*model holds no LoRA; leave the option out\.$"):
        convert(folder, tmp_path / "out", "sat", PARTS, MERGE)
    write_sat(tmp_path / "bare", sat_lora())
    with pytest.raises(
        ConfigError, match="holds a LoRA and not the weights that it belongs to; name their folder"
    ):
        convert(tmp_path / "bare", tmp_path / "out", "diffusers", PARTS, Options(merge=True, alpha=1))
    name, file = "transformer.{}.lora_{}.weight", folder / LORA_FILE

    def refuse(message: str, **tensors: torch.Tensor) -> None:
        save_file({name.format(*n.rsplit("_", 1)).replace("-", "."): t for n, t in tensors.items()}, file)
        with pytest.raises(ConfigError, match=message):
            convert(folder, tmp_path / "out", "sat", PARTS, MERGE)

    a, b = torch.randn(RANK, HIDDEN), torch.randn(HIDDEN, RANK)
    refuse(
        r"its LoRA is for a proj_out of \[32, 32\], and the base has \[64, 32\]; name its own",
        proj_out_A=a,
        proj_out_B=b,
    )
    refuse(
        r"its LoRA is for a proj_in of \[32, 32\], and the base has none; name its own", proj_in_A=a, proj_in_B=b
    )
    more = {"proj_in_A": a[:2].clone(), "proj_in_B": b[:, :2].clone()}
    refuse(r"several ranks \(2 of proj_in.lora_A.weight, 4 of proj_out.lora_A", proj_out_A=a, proj_out_B=b, **more)
    nan = torch.full((64, RANK), torch.nan)
    refuse("its LoRA holds no numbers .*; take an earlier checkpoint", proj_out_A=a, proj_out_B=nan)
    assert not (tmp_path / "out").exists()
