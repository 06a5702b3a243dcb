from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sat_ext.models import checkpointing
from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.models.generate import generate
from tests.models.conftest import FAMILIES, make_batch, make_engine, small_config

LAYERS = 5
LORA = {"mode": "lora", "rank": 2, "alpha": 2}


def engine_of(family: str = "5b-i2v", **changes: Any) -> VideoDiffusionEngine:
    transformer = {**FAMILIES[family]["transformer"], "num_layers": LAYERS}
    engine = make_engine(small_config(family, transformer=transformer, **changes))
    for name, parameter in engine.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # they begin as zero, and would hide A's gradients
    return engine


def loss_and_gradients(engine: VideoDiffusionEngine, frames: int = 5) -> dict[str, torch.Tensor]:
    engine.zero_grad()
    loss = engine(make_batch(frames, seed=3))[0]
    loss.backward()
    found = {n: p.grad for n, p in engine.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", ["5b-i2v", "1.5-5b-i2v"])
@pytest.mark.parametrize("train", [{"mode": "full"}, LORA], ids=["full", "lora"])
def test_loss_and_gradients_are_the_same_to_the_last_bit(family: str, train: dict[str, Any]) -> None:
    expected = loss_and_gradients(engine_of(family, train=train))
    for lever in (True, {"every": 2}, {"offload": True}, {"every": 3, "offload": True}):
        engine = engine_of(family, train=train, gradient_checkpointing=lever)
        assert_same(loss_and_gradients(engine), expected)
        assert_same(loss_and_gradients(engine), expected)  # and again, with what the first pass left behind


@pytest.mark.parametrize(("every", "calls"), [(1, [2] * LAYERS), (2, [2, 1, 2, 1, 2]), (4, [2, 1, 1, 1, 2])])
def test_the_first_of_every_n_blocks_computes_again(every: int, calls: list[int]) -> None:
    engine = engine_of(gradient_checkpointing={"every": every})
    found = [0] * LAYERS
    for index, block in enumerate(engine.network.transformer_blocks):

        def count(*_: Any, index: int = index) -> None:
            found[index] += 1

        block.register_forward_pre_hook(count)
    loss_and_gradients(engine)
    assert found == calls


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_inputs_are_kept_nowhere_else(offload: bool) -> None:
    engine = engine_of(train=LORA, gradient_checkpointing={"offload": offload})
    inputs = []
    for block in engine.network.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[3].untyped_storage())))
    loss = engine(make_batch(5, seed=3))[0]
    assert [reference.expired() for reference in inputs] == [offload] * LAYERS
    loss.backward()
    assert all(reference.expired() for reference in inputs)


def test_inputs_come_back_one_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(train=LORA, gradient_checkpointing={"offload": True})
    loss = engine(make_batch(5, seed=3))[0]
    events: list[str] = []
    copies: list[StorageWeakRef] = []
    fetch = checkpointing._Saved.fetch

    def watched(saved: Any) -> None:
        begun = saved.coming is not None
        fetch(saved)
        if not begun:
            events.append("fetch")
            copies.append(StorageWeakRef(saved.coming.target.untyped_storage()))

    monkeypatch.setattr(checkpointing._Saved, "fetch", watched)
    for index, block in enumerate(engine.network.transformer_blocks):

        def computes(*_: Any, index: int = index) -> None:
            events.append(f"block {index}")
            assert sum(not copy.expired() for copy in copies) <= 4  # of two blocks, each of tokens and of text

        block.register_forward_pre_hook(computes)
    loss.backward()
    middle = [f for i in (3, 2, 1) for f in (f"block {i}", "fetch", "fetch")]
    assert events == ["fetch"] * 4 + ["block 4", "fetch", "fetch", *middle[:-2], "block 0"]
    assert all(copy.expired() for copy in copies)


def test_a_graph_that_is_thrown_away_takes_the_copies_with_it() -> None:
    engine = engine_of(train=LORA, gradient_checkpointing={"offload": True})
    loss = engine(make_batch(5, seed=3))[0]
    last = engine.network._gradient_checkpointing_func.inputs._last
    assert last() is not None
    del loss
    assert last() is None


def test_evaluations_and_samples_recompute_nothing() -> None:
    engine = engine_of(gradient_checkpointing={"offload": True}).eval()
    expected = engine_of().eval()
    batch = make_batch(5)
    assert torch.equal(engine(batch)[0], expected(batch)[0])
    made = [
        generate(e, ["a"], frames=5, height=32, width=32, steps=2, generator=torch.Generator().manual_seed(0))
        for e in (engine, expected)
    ]
    assert torch.equal(*made)
