from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sat_ext.models.folder import load_model_config
from sat_ext.models.quantize import CODES, QuantizedLinear
from sat_ext.models.transformer import build_transformer
from tests.models.conftest import make_batch, make_engine, small_config
from tests.models.test_checkpointing import LORA, engine_of, loss_and_gradients

KINDS = ["nf4", "fp8"]


def quantized(linear: nn.Linear, kind: str) -> QuantizedLinear:
    return QuantizedLinear(linear, CODES[kind], in_state_dict=True)


def whole(layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return layer.read(layer.weight, layer.scales, dtype)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.1), ("fp8", 0.03)])
def test_weights_come_back_with_a_small_error(kind: str, error: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 384)
    nn.init.normal_(linear.weight, std=0.02)
    difference = whole(quantized(linear, kind)) - linear.weight
    assert difference.std() < error * linear.weight.std()


@pytest.mark.parametrize(("kind", "size"), [("nf4", 256 * 384 * (0.5 + 2 / 64)), ("fp8", 256 * 384 + 384)])
def test_bytes_of_a_weight(kind: str, size: float) -> None:
    layer = quantized(nn.Linear(256, 384), kind)
    assert layer.weight.nbytes + layer.scales.nbytes == size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
@pytest.mark.parametrize("shape", [(7, 5), (96, 64)])
def test_what_was_quantized_once_quantizes_to_the_same_bits(
    kind: str, scale: float, shape: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape) * scale
    weight[0] = 0.0
    weight[1, 0] = 100 * scale  # and a few small ones beside it
    code = CODES[kind]
    once = code.quantize(weight)
    made = code.dequantize(*once, weight.shape, torch.float32)
    assert made.isfinite().all() and not made[0].any()
    for dtype in (torch.float32, torch.bfloat16):
        again = code.dequantize(*code.quantize(made.to(dtype)), weight.shape, torch.float32)
        torch.testing.assert_close(
            again, made, rtol=0 if kind == "fp8" or dtype == torch.float32 else 1e-2, atol=0
        )
    assert torch.equal(code.dequantize(*code.quantize(made), weight.shape, torch.float32), made)


@pytest.mark.parametrize("kind", KINDS)
def test_no_cast_changes_a_weight(kind: str) -> None:
    layer = quantized(nn.Linear(64, 32), kind)
    expected = whole(layer)
    for cast in (layer.half, layer.bfloat16, layer.float, lambda: layer.to(torch.float16)):
        cast()
        assert layer.weight.dtype == torch.uint8 and torch.equal(whole(layer), expected)
    assert layer.bias.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_weights_as_they_are_read(kind: str) -> None:
    linear = nn.Linear(64, 32)
    layer = quantized(linear, kind)
    with torch.no_grad():
        linear.weight.copy_(whole(layer))
    inputs = [torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True) for _ in "ab"]
    outputs = [module(x) for module, x in zip((linear, layer), inputs)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def kinds_of(network: nn.Module) -> dict[str, str]:
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            found[name] = next(kind for kind, code in CODES.items() if code is module.code)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_blocks_are_quantized(kind: str) -> None:
    network = build_transformer(
        load_model_config(small_config("5b-i2v", train={**LORA, "quantization": kind})), torch.float32
    )
    found = kinds_of(network)
    per_block = {
        name.split(".", 2)[2]: of for name, of in found.items() if name.startswith("transformer_blocks.0.")
    }
    attention = {f"attn1.{n}.base_layer": kind for n in ("to_q", "to_k", "to_v", "to_out.0")}
    forward = {"ff.net.0.proj": kind, "ff.net.2": kind}
    assert per_block == {**attention, **forward, "norm1.linear": "fp8", "norm2.linear": "fp8"}
    assert len(found) == 2 * len(per_block)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_gradients_of_a_model_with_the_weights_as_they_are_read(kind: str) -> None:
    plain, engine = engine_of(train=LORA), engine_of(train={**LORA, "quantization": kind})
    exact = loss_and_gradients(plain)
    plain.load_state_dict(engine.state_dict())
    expected, found = loss_and_gradients(plain), loss_and_gradients(engine)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert any(not torch.equal(value, exact[name]) for name, value in found.items())
    torch.testing.assert_close(found["loss"], exact["loss"], rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_holds_whole_weights_and_brings_the_same_bits_back(kind: str) -> None:
    engine = engine_of(train={**LORA, "quantization": kind}).bfloat16()
    state = engine.state_dict()
    assert state.keys() == engine_of(train=LORA).state_dict().keys()
    assert not any(v.dtype in (torch.uint8, torch.int8, torch.int16) for v in state.values())
    other = engine_of(train={**LORA, "quantization": kind}).bfloat16()
    for parameter in other.network.parameters():
        parameter.data = parameter.data.flip(0)
    other.load_state_dict(state)
    for mine, theirs in ((engine.parameters(), other.parameters()), (engine.buffers(), other.buffers())):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_a_folder_are_quantized_and_not_saved(pretrained: Callable[..., Path], kind: str) -> None:
    base: dict[str, Any] = {"pretrained": str(pretrained()), "conditioning": "i2v"}
    engine = make_engine({**base, "train": {**LORA, "quantization": kind}})
    plain = make_engine({**base, "train": LORA})
    assert engine.state_dict().keys() == plain.state_dict().keys()
    assert all("lora_" in name for name in engine.state_dict())
    assert not any(n.endswith("to_q.base_layer.weight") for n in engine.network.state_dict())
    ours, theirs = (e.network.transformer_blocks[0].ff.net[2] for e in (engine, plain))
    assert isinstance(ours, QuantizedLinear)
    assert (whole(ours) - theirs.weight).std() < 0.11 * theirs.weight.std()
    loss = engine(make_batch(5))[0]
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_can_be_counted_without_memory(kind: str) -> None:
    config = load_model_config(
        small_config("5b", train={**LORA, "quantization": kind}, gradient_checkpointing=True, block_swap=0)
    )
    with torch.device("meta"):
        network = build_transformer(config, torch.bfloat16)
    real = build_transformer(config, torch.bfloat16)
    for counted, there in ((network.parameters(), real.parameters()), (network.buffers(), real.buffers())):
        assert [(t.shape, t.dtype) for t in counted] == [(t.shape, t.dtype) for t in there]


def test_a_weight_of_another_shape_is_refused() -> None:
    layer = quantized(nn.Linear(64, 32), "fp8")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": torch.zeros(16, 64), "bias": torch.zeros(32)})
