"""The levers on memory change where things are and when they are computed, and nothing of what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from sat_ext.errors import ConfigError
from sat_ext.models.block_swap import SwappedBlock, swapped_indices
from sat_ext.models.checkpointing import WaitingInputs, _Away
from sat_ext.models.config import load_model_config
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.quantize import Float8Linear
from tests.models.conftest import make_batch, make_engine, small_config

LORA = {"mode": "lora", "rank": 2, "alpha": 2}


def lora_engine(folder: Path, levers: dict[str, Any], **train: Any) -> VideoDiffusionEngine:
    """Of a pretrained folder, whose weights are the same whatever the levers, with adapters that are open."""
    engine = VideoDiffusionEngine(
        SimpleNamespace(
            model_config={
                "pretrained": str(folder), "conditioning": "i2v", "train": {**LORA, **train}, **levers,
            },
            seed=1,
        )
    )  # fmt: skip
    torch.manual_seed(5)
    for name, parameter in engine.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return engine


def train_once(engine: VideoDiffusionEngine) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of two steps, and every gradient."""
    losses = []
    for frames in (9, 5):
        loss, _ = engine.train()(make_batch(frames, seed=3))
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), {
        name.replace(".base_layer.", "."): p.grad for name, p in engine.named_parameters() if p.grad is not None
    }


CHECKPOINTING = [
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": {"every": 2}},
    {"gradient_checkpointing": {"offload": True}},
    {"gradient_checkpointing": {"every": 2, "offload": True}},
]


@pytest.mark.parametrize("levers", CHECKPOINTING, ids=str)
def test_checkpointing_changes_no_bit_of_loss_and_gradients(levers: dict[str, Any]) -> None:
    loss, gradients = train_once(make_engine(small_config("5b-i2v")))
    same_loss, same = train_once(make_engine(small_config("5b-i2v", **levers)))
    assert torch.equal(loss, same_loss) and gradients.keys() == same.keys() != set()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


@pytest.mark.parametrize(
    "levers",
    [
        {"block_swap": 1, "gradient_checkpointing": True},
        {"block_swap": 2, "gradient_checkpointing": True},
        {"block_swap": 2, "gradient_checkpointing": {"offload": True}},
    ],
    ids=str,
)
def test_swapped_blocks_change_no_bit_of_loss_and_gradients(
    pretrained: Callable[..., Path], levers: dict[str, Any]
) -> None:
    folder = pretrained("5b-i2v")
    loss, gradients = train_once(lora_engine(folder, {}))
    same_loss, same = train_once(lora_engine(folder, levers))
    assert torch.equal(loss, same_loss) and gradients.keys() == same.keys() != set()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def kept_bytes(engine: VideoDiffusionEngine) -> int:
    """What autograd keeps of one forward pass beside parameters."""
    own = {p.data_ptr() for p in engine.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train()(make_batch(9, seed=3))
    return sum(kept.values())


def test_every_block_that_is_recomputed_keeps_less() -> None:
    config = {**small_config("5b-i2v")}
    none, half, every = (
        kept_bytes(make_engine({**config, "gradient_checkpointing": value}))
        for value in (False, {"every": 2}, True)
    )
    assert every < half < none


def test_offloaded_inputs_are_the_only_ones_that_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, ...]] = []
    send = WaitingInputs._send

    def watched(self: WaitingInputs, value: torch.Tensor) -> Any:
        sent.append(tuple(value.shape))
        return send(self, value)

    monkeypatch.setattr(WaitingInputs, "_send", watched)
    engine = make_engine(small_config("5b-i2v", gradient_checkpointing={"offload": True}))
    loss, _ = engine.train()(make_batch(9, seed=3))
    loss.backward()
    tokens = 3 * 2 * 2  # latent frames, and patches of 32 pixels a side
    assert sent == [(2, tokens, 32)] * 2  # the hidden states of each block, not text, time or positions


def test_inputs_come_back_whatever_the_order_of_the_backward_pass() -> None:
    waiting = WaitingInputs()
    values = [torch.randn(3) for _ in range(4)]
    away = [waiting._send(value) for value in values]
    for i in (2, 3, 0, 1):
        assert isinstance(away[i], _Away) and torch.equal(waiting._bring(away[i]), values[i])


def test_at_most_two_swapped_blocks_are_fetched_at_a_time(
    pretrained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    present: list[int] = []
    engine = lora_engine(pretrained("5b-i2v"), {"block_swap": 2, "gradient_checkpointing": True})
    blocks = [b.forward.__self__ for b in engine.network.transformer_blocks]
    assert all(isinstance(block, SwappedBlock) for block in blocks)

    def count() -> int:
        here = sum(b.weights[0].data_ptr() != b.homes[b.weights[0]].data_ptr() for b in blocks)
        return here + sum(b._coming is not None for b in blocks)

    for block in blocks:
        original = block._forward
        monkeypatch.setattr(
            block, "_forward", lambda *a, _f=original, **k: (present.append(count()), _f(*a, **k))[1]
        )
    loss, _ = engine.train()(make_batch(9, seed=3))
    assert count() <= 1  # the last one may have begun to fetch nothing
    loss.backward()
    assert present and max(present) == 2
    engine.eval()
    with torch.no_grad():
        engine(make_batch(9))
    assert all(torch.equal(w.data, block.homes[w]) for block in blocks for w in block.weights)


def test_a_swapped_model_is_whole_to_whoever_saves_loads_moves_or_casts_it(
    pretrained: Callable[..., Path],
) -> None:
    folder = pretrained("5b-i2v")
    plain, swapped = (
        lora_engine(folder, levers) for levers in ({}, {"block_swap": 2, "gradient_checkpointing": True})
    )
    weights = swapped.network.state_dict()
    assert weights.keys() == plain.network.state_dict().keys()
    assert all(torch.equal(weights[n], value) for n, value in plain.network.state_dict().items())
    doubled = {name: value * 2 for name, value in weights.items()}
    swapped.network.load_state_dict(doubled)
    swapped.to(torch.bfloat16)
    for name, value in swapped.network.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, doubled[name].bfloat16()), name
    assert swapped.train()(make_batch(5, seed=1))[0].isfinite()
    meta = torch.device("meta")  # as a GPU: what does not train stays
    swapped.network.transformer_blocks.to(meta)
    for name, parameter in swapped.network.transformer_blocks.named_parameters():
        assert parameter.device.type == ("meta" if "lora_" in name else "cpu")


def test_blocks_are_swapped_evenly() -> None:
    for number in range(43):
        indices = swapped_indices(number, 42)
        assert len(indices) == number and len(set(indices)) == number
        gaps = [b - a for a, b in zip(indices, indices[1:])]
        assert max(gaps, default=1) - min(gaps, default=1) <= 1


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_a_quantized_base_trains_its_adapters_near_the_whole_one(
    pretrained: Callable[..., Path], kind: str
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = pretrained("5b-i2v")
    loss, gradients = train_once(lora_engine(folder, {}))
    engine = lora_engine(folder, {}, quantization=kind)
    near_loss, near = train_once(engine)
    torch.testing.assert_close(near_loss, loss, rtol=0.05, atol=0.01)
    assert gradients.keys() == near.keys() and all("lora_" in name for name in near)
    ours, theirs = (torch.cat([g[n].flatten() for n in gradients]) for g in (near, gradients))
    assert nn.functional.cosine_similarity(ours, theirs, dim=0) > (0.99 if kind == "fp8" else 0.9)
    layer = engine.network.transformer_blocks[0].attn1.to_q.base_layer
    assert layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
    assert layer.weight.numel() == 32 * 32 // (2 if kind == "nf4" else 1)
    assert not any("base_layer" in name for name in engine.state_dict())


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
@pytest.mark.parametrize("levers", [{}, {"block_swap": 2, "gradient_checkpointing": {"offload": True}}], ids=str)
def test_a_quantized_base_survives_the_casts_of_sat_and_deepspeed(
    pretrained: Callable[..., Path], kind: str, levers: dict[str, Any]
) -> None:
    pytest.importorskip("bitsandbytes")
    engine = lora_engine(pretrained("5b-i2v"), levers, quantization=kind)
    expected = engine.eval()(make_batch(9))[0]
    engine.to(torch.bfloat16).bfloat16().float()
    for name, parameter in engine.named_parameters():
        if "lora_" in name:
            continue
        assert parameter.dtype in (torch.uint8, torch.float32)
    torch.testing.assert_close(engine.eval()(make_batch(9))[0], expected, rtol=0.02, atol=0.01)
    loss, _ = engine.train()(make_batch(9, seed=3))
    loss.backward()


def test_an_fp8_layer_is_within_fp8s_rounding_of_the_whole_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).requires_grad_(False)
    layer.weight.data *= torch.logspace(-6, 3, 48)[:, None]  # rows of very different size
    rounded = Float8Linear.of(layer)
    whole = rounded.weight.view(torch.float8_e4m3fn).float() * torch.exp2(rounded.exponents.float())
    error = (whole - layer.weight).abs().amax(dim=1) / layer.weight.abs().amax(dim=1)
    assert error.max() <= 2**-4  # 3 bits of mantissa
    given = torch.randn(5, 64, requires_grad=True)
    (rounded(given) ** 2).sum().backward()
    again = given.detach().requires_grad_()
    (nn.functional.linear(again, whole, layer.bias) ** 2).sum().backward()
    torch.testing.assert_close(given.grad, again.grad)


def test_a_text_encoder_off_the_gpu_gives_the_same_and_is_no_part_of_the_model(
    pretrained: Callable[..., Path],
) -> None:
    folder = pretrained("5b-i2v")
    expected = lora_engine(folder, {}).text.encode(["a b"], torch.device("cpu"), torch.float32)
    for place in ("cpu", "on_off"):
        engine = lora_engine(folder, {"text": {"device": place}})
        assert torch.equal(engine.text.encode(["a b"], torch.device("cpu"), torch.float32), expected)
        assert not any(name.startswith("text.") for name, _ in engine.named_parameters())


def test_a_text_encoder_in_nf4_gives_nearly_the_same(pretrained: Callable[..., Path]) -> None:
    pytest.importorskip("bitsandbytes")
    folder = pretrained("5b-i2v")
    expected = lora_engine(folder, {}).text.encode(["a b"], torch.device("cpu"), torch.float32)
    found = lora_engine(folder, {"text": {"quantization": "nf4"}}).text
    assert any(p.dtype == torch.uint8 for p in found.parameters())
    encoded = found.encode(["a b"], torch.device("cpu"), torch.float32)
    assert nn.functional.cosine_similarity(encoded.flatten(), expected.flatten(), dim=0) > 0.95


def test_the_first_stage_takes_samples_and_frames_as_it_is_told(pretrained: Callable[..., Path]) -> None:
    folder = pretrained("5b-i2v")
    pixels = make_batch(17)["mp4"]
    plain = lora_engine(folder, {}).first_stage
    sliced = lora_engine(folder, {"first_stage": {"slicing": True, "frames": 4}}).first_stage
    taken: list[tuple[int, ...]] = []
    sliced.vae.encoder.register_forward_pre_hook(lambda _, given: taken.append(tuple(given[0].shape)))
    latents = sliced.encode(pixels)
    assert [t[0] for t in taken] == [1] * 8 and [t[2] for t in taken] == [5, 4, 4, 4] * 2
    assert latents.shape == plain.encode(pixels).shape
    assert (sliced.vae.use_tiling, sliced.vae.use_slicing) == (False, True)
    decoded: list[bool] = []
    sliced.vae.decoder.register_forward_pre_hook(lambda *_: decoded.append(sliced.vae.use_tiling))
    sliced.decode(latents)
    assert decoded and all(decoded) and not sliced.vae.use_tiling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_swap": 1}, "model.block_swap: 1 moves frozen weights, and train.mode 'full' has none"),
        ({"block_swap": 1, "train": LORA}, "block_swap: 1 needs gradient checkpointing of every block"),
        ({"block_swap": -1}, "model.block_swap: -1 blocks; give 0"),
        ({"gradient_checkpointing": {"every": 0}}, "gradient_checkpointing.every: 0; give 1"),
        ({"train": {"quantization": "nf4"}}, "quantization: nf4 is for the frozen weights below a LoRA"),
        ({"train": {**LORA, "quantization": "fp8"}}, "no folder gives them back; set model.pretrained"),
        ({"train": {**LORA, "quantization": "nf8"}}, "'nf8' is not one of none, nf4, fp8"),
        ({"text": {"kind": "byt5", "device": "cpu"}}, "kind 'byt5' is tiny"),
        ({"first_stage": {"frames": 6}}, "model.first_stage.frames: 6; give a multiple of 4"),
    ],
)
def test_levers_that_make_no_sense_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model_config({**small_config("5b"), **changes})


def test_levers_that_need_another_model_or_stage_are_refused(pretrained: Callable[..., Path]) -> None:
    folder = pretrained("5b-i2v")
    recompute = {"gradient_checkpointing": True}
    with pytest.raises(ConfigError, match="model.block_swap: 3, but the transformer has 2 blocks"):
        lora_engine(folder, {"block_swap": 3, **recompute})
    with pytest.raises(ConfigError, match="text.quantization: nf4 is computed on the GPU, and device is 'cpu'"):
        lora_engine(folder, {"text": {"quantization": "nf4", "device": "cpu"}})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="model.text.quantization: int8 needs a GPU, and there is none"):
            lora_engine(folder, {"text": {"quantization": "int8"}})
    for levers, train in (({"block_swap": 1, **recompute}, {}), ({}, {"quantization": "nf4"})):
        config = {"pretrained": str(folder), "conditioning": "i2v", "train": {**LORA, **train}, **levers}
        args = SimpleNamespace(model_config=config, deepspeed_config={"zero_optimization": {"stage": 3}})
        with pytest.raises(ConfigError, match="does not go with ZeRO-3, which splits and moves weights itself"):
            VideoDiffusionEngine(args)
