"""A LoRA on any layer, with rsLoRA or DoRA: trained by our forward pass, and what diffusers' computes with it."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from sat_ext.errors import ConfigError
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.folder import check_zero, load_model_config
from sat_ext.models.section import BuiltIn
from sat_ext.models.transformer import build_transformer
from tests.models.conftest import FAMILIES, make_engine, small_config, write_pretrained
from tests.models.test_checkpointing import assert_same, engine_of, loss_and_gradients
from tests.models.test_packs import inputs_of, opened, run

ATTENTION = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
BLOCK = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"]
AROUND = ["patch_embed", "time_embedding", "norm_out.linear", "proj_out"]
VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}]
NAMES = ["lora", "rslora", "dora", "both"]


def lora(targets: Any = "attention", **changes: Any) -> dict[str, Any]:
    return {"mode": "lora", "rank": 2, "alpha": 3, "target_modules": targets, **changes}


def adapted(engine: VideoDiffusionEngine) -> set[str]:
    """Names of the adapted layers, without their block's, which must be in all blocks."""
    found = [n for n, module in engine.network.named_modules() if hasattr(module, "lora_A")]
    kinds = Counter(re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in found)
    blocks = len(engine.network.transformer_blocks)
    assert all(count == (blocks if kind in BLOCK else 1) for kind, count in kinds.items())
    return set(kinds)


def as_by_diffusers(engine: VideoDiffusionEngine) -> list[torch.Tensor]:
    """What diffusers' own forward pass predicts for the first group, with the adapters of PEFT's own making."""
    own = CogVideoXTransformer3DModel.from_config(engine.network.config)
    own.add_adapter(deepcopy(engine.network.peft_config["default"]))
    own.load_state_dict(engine.network.state_dict())
    given: list[Any] = []
    hook = engine.network.register_forward_pre_hook(lambda _, a, o: given.append((*a, o)), with_kwargs=True)
    run(engine, inputs_of(engine)[:1])
    hook.remove()
    (((group,), options),) = given
    ofs = None if options["ofs"] is None else torch.full((1,), options["ofs"])
    return own(
        group.latents, group.text, group.timesteps, ofs=ofs, image_rotary_emb=group.rotary, return_dict=False
    )[0]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", ATTENTION),
        ("all-linear", BLOCK),
        (["ff.net.2", "norm1.linear"], ["ff.net.2", "norm1.linear"]),
        (
            ["ff", "to_out", "patch_embed.proj"],
            ["ff.net.0.proj", "ff.net.2", "attn1.to_out.0", "patch_embed.proj"],
        ),
        (["proj_out", "norm_out"], ["proj_out", "norm_out.linear"]),
    ],
)
def test_targets_are_names_of_layers_or_of_what_holds_them(targets: Any, expected: list[str]) -> None:
    assert adapted(engine_of(train=lora(targets))) == set(expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
@pytest.mark.parametrize("targets", ["attention", "all-linear", AROUND], ids=["attention", "all", "around"])
def test_every_adapter_trains_and_predicts_as_in_diffusers(
    family: str, targets: Any, variant: dict[str, bool]
) -> None:
    engine = opened(make_engine(small_config(family, train=lora(targets, **variant)))).train()
    groups = inputs_of(engine)
    before = run(engine, groups)
    sum(velocity.square().sum() for velocity in before).backward()  # type: ignore[union-attr]
    trained = {name: p for name, p in engine.named_parameters() if p.requires_grad}
    of_layer = 3 if variant.get("dora") else 2
    layers = sum(hasattr(module, "lora_A") for module in engine.network.modules())
    assert len(trained) == of_layer * layers and all("lora_" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    torch.optim.SGD(trained.values(), lr=1e-3).step()
    after = run(engine, groups)
    assert not torch.equal(after[0], before[0])
    torch.testing.assert_close(after[0], as_by_diffusers(engine), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_a_dora_begins_as_its_base(quantization: str) -> None:
    plain, dora = (
        engine_of(train=lora("all-linear", quantization=quantization, dora=dora)) for dora in (False, True)
    )
    for engine in (plain, dora):
        for name, parameter in engine.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
    groups = inputs_of(plain)[:1]
    torch.testing.assert_close(run(dora, groups), run(plain, groups), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_a_dora_begins_as_weights_that_are_loaded_below_it(quantization: str) -> None:
    base = opened(make_engine(small_config("5b")))
    train = lora([*BLOCK, "patch_embed.proj"], quantization=quantization)
    plain, dora = (make_engine(small_config("5b", train={**train, "dora": dora})) for dora in (False, True))
    order = [p for p in dora.parameters() if p.requires_grad]
    for engine in (plain, dora):
        names = {n.replace(".base_layer.", "."): n for n, _ in engine.named_parameters()}
        state = {names.get(n, n): t for n, t in base.state_dict().items()}
        engine.load_state_dict(state, strict=False)
    assert all(a is b for a, b in zip(order, (p for p in dora.parameters() if p.requires_grad), strict=True))
    groups = inputs_of(plain)[:1]
    torch.testing.assert_close(run(dora, groups), run(plain, groups), rtol=1e-4, atol=1e-5)
    # and its own norms, where they are loaded, stay as they are
    for name, parameter in dora.named_parameters():
        if "magnitude" in name:
            torch.nn.init.constant_(parameter, 2.0)
    saved = {name: value.clone() for name, value in dora.state_dict().items()}
    again = make_engine(small_config("5b", train={**train, "dora": True}))
    again.load_state_dict(saved)
    assert_same(again.state_dict(), saved)


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
def test_swapped_blocks_change_nothing_of_a_dora(quantization: str) -> None:
    train = lora("all-linear", quantization=quantization, dora=True)
    expected = loss_and_gradients(engine_of(train=train))
    engine = engine_of(train=train, block_swap=3, gradient_checkpointing=True)
    for _ in range(2):
        assert_same(loss_and_gradients(engine), expected)


def test_a_run_on_a_folder_saves_its_adapters_alone(tmp_path: Path) -> None:
    folder = write_pretrained(tmp_path, "5b-i2v")
    model = {"pretrained": str(folder), "conditioning": "i2v"}
    engine = make_engine({**model, "train": lora(["ff.net.2", "patch_embed.proj"], dora=True)})
    layers = ["patch_embed.proj", *(f"transformer_blocks.{i}.ff.net.2" for i in range(2))]
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    assert engine.state_dict().keys() == {f"network.{n}.{part}.default.weight" for n in layers for part in parts}


@pytest.mark.parametrize("target", ["to_x", "norm_q", "transformer_blocks.0.attn1.to_q", "pos_embedding"])
def test_a_name_that_is_none_is_refused_with_those_there_are(target: str) -> None:
    config = load_model_config(small_config("5b", train=lora(["to_q", target])))
    listed = r"patch_embed\.proj, patch_embed\.text_proj, time_embedding\.linear_1, .*norm1\.linear, .*proj_out\.$"
    message = f"no layer of the transformer is called '{target}'; write attention or all-linear, or a list of "
    with pytest.raises(ConfigError, match=message + listed):
        build_transformer(config, torch.float32)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"rank": 0}, "model.train.rank: 0 leaves nothing to train; use 1 or more."),
        (
            {"target_modules": []},
            r"model.train.target_modules: \[\] leaves nothing to train; write attention or all",
        ),
    ],
)
def test_a_lora_of_nothing_is_refused(train: dict[str, Any], message: str) -> None:
    model = small_config("5b", train={"mode": "lora", **train})
    BuiltIn(model).check_base()  # it is a LoRA all the same
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_model_config(model)


def test_a_preset_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_modules: 'all' is not one of attention, all-linear"):
        load_model_config(small_config("5b", train=lora("all")))


def test_a_dora_is_refused_under_zero3() -> None:
    config = load_model_config(small_config("5b", train=lora(dora=True)))
    check_zero(config, 2)
    with pytest.raises(ConfigError, match=r"model\.train\.dora: true, but ZeRO-3 shards all .* use stage 2"):
        check_zero(config, 3)
    check_zero(load_model_config(small_config("5b", train=lora(rslora=True))), 3)


def test_the_scale_of_rslora_is_over_the_root_of_the_rank() -> None:
    train = {"mode": "lora", "rank": 16, "alpha": 8}
    assert BuiltIn({"train": train}).lora_scale == (0.5, "8/16")
    assert BuiltIn({"train": {**train, "rslora": True}}).lora_scale == (2.0, "8/sqrt(16)")
