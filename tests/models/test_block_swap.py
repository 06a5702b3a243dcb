from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sat_ext.models import side_stream
from sat_ext.models.block_swap import SwappedBlock
from sat_ext.models.generate import generate
from sat_ext.models.side_stream import host_memory, page_lock
from sat_ext.models.text_offload import lock_weights, on_device
from tests.models.conftest import make_batch
from tests.models.test_checkpointing import LAYERS, LORA, assert_same, engine_of, loss_and_gradients

QUANTIZATIONS = ["none", "nf4", "fp8"]


def swapped(count: int = LAYERS, quantization: str = "none", **changes: Any) -> Any:
    train = {**LORA, "quantization": quantization}
    return engine_of(train=train, block_swap=count, **{"gradient_checkpointing": True, **changes})


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, StorageWeakRef]]:
    """Copies that were made: of which block, and whether they still exist."""
    made: list[tuple[int, StorageWeakRef]] = []
    blocks: list[SwappedBlock] = []
    fetch = SwappedBlock.fetch

    def watched(block: SwappedBlock) -> None:
        begun = block.fetched is not None
        fetch(block)
        if not begun:
            assert block.fetched is not None
            if block not in blocks:
                blocks.append(block)
            made.append((blocks.index(block), StorageWeakRef(block.fetched.target.untyped_storage())))

    monkeypatch.setattr(SwappedBlock, "fetch", watched)
    return made


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("offload", [False, True])
def test_loss_and_gradients_are_the_same_to_the_last_bit(quantization: str, offload: bool) -> None:
    expected = loss_and_gradients(engine_of(train={**LORA, "quantization": quantization}))
    for count in (3, LAYERS):
        engine = swapped(count, quantization, gradient_checkpointing={"offload": offload})
        for _ in range(2):
            assert_same(loss_and_gradients(engine), expected)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_two_blocks_at_most_are_fetched(fetches: list[tuple[int, StorageWeakRef]], quantization: str) -> None:
    engine = swapped(quantization=quantization)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(not copy.expired() for _, copy in fetches))

    for block in engine.network.transformer_blocks:
        block.register_forward_pre_hook(count)  # just before the block computes
        for layer in (block.attn1.to_q, block.ff):
            layer.register_full_backward_hook(count)
    for _ in range(2):
        loss_and_gradients(engine)
    with torch.no_grad():
        engine(make_batch(5, seed=3))
    assert most == 2


def test_blocks_are_fetched_ahead_and_stay_where_a_pass_turns(
    fetches: list[tuple[int, StorageWeakRef]],
) -> None:
    engine = swapped()
    missed = []
    for index, block in enumerate(engine.network.transformer_blocks):
        # called before the window's own hook
        swap = next(h.func.__self__.blocks[index] for h in block._forward_pre_hooks.values())
        block.register_forward_pre_hook(
            lambda *_, s=swap, i=index: missed.append(i) if s.fetched is None else None, prepend=True
        )
    loss_and_gradients(engine)
    assert [index for index, _ in fetches] == [0, 1, 2, 3, 4, 2, 1, 0]
    loss_and_gradients(engine)
    assert [index for index, _ in fetches[8:]] == [2, 3, 4, 2, 1, 0]
    fetches.clear()
    engine.eval()(make_batch(5))
    assert [index for index, _ in fetches] == ([2, 3, 4, 0, 1] * 4)[:-1]  # four noise levels
    assert missed == [0]  # the very first


def test_weights_are_on_the_device_only_as_long_as_they_are_needed() -> None:
    engine = swapped(3)
    sizes = {
        name: parameter.numel()
        for name, parameter in engine.network.transformer_blocks.named_parameters()
        if "lora_" not in name
    }
    assert [int(name.split(".")[0]) for name, size in sizes.items() if size == 0][::28] == [0, 1, 3]
    assert all(p.numel() for n, p in engine.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_state_dicts_hold_the_weights_and_fill_them(quantization: str) -> None:
    plain, engine = engine_of(train={**LORA, "quantization": quantization}), swapped(3, quantization)
    for state in (engine.state_dict(), engine.network.state_dict()):
        assert all(value.numel() for value in state.values())
    assert_same(engine.state_dict(), plain.state_dict())
    changed = {name: value * 0.5 for name, value in plain.state_dict().items()}
    loss_and_gradients(engine)  # with blocks that are fetched, and are not what is loaded
    for filled in (plain, engine):
        missing, unexpected = filled.load_state_dict(changed)
        assert not missing and not unexpected
    assert_same(engine.state_dict(), plain.state_dict())
    assert_same(loss_and_gradients(engine), loss_and_gradients(plain))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_model_that_is_cast_and_moved_casts_them_too(quantization: str) -> None:
    plain = engine_of(train={**LORA, "quantization": quantization}, gradient_checkpointing=True)
    engine = swapped(3, quantization)
    expected = loss_and_gradients(plain.bfloat16().to("cpu"))
    assert_same(loss_and_gradients(engine.bfloat16().to("cpu")), expected)
    home = engine.network.transformer_blocks[1].state_dict()
    assert {v.dtype for n, v in home.items() if "bias" in n} == {torch.bfloat16}


def test_evaluations_and_samples_are_the_same() -> None:
    plain, engine, batch = engine_of(train=LORA).eval(), swapped(4).eval(), make_batch(5)
    assert torch.equal(engine(batch)[0], plain(batch)[0])
    made = [
        generate(e, ["a"], frames=5, height=32, width=32, steps=2, generator=torch.Generator().manual_seed(0))
        for e in (engine, plain)
    ]
    assert torch.equal(*made)
    engine.train()
    assert_same(loss_and_gradients(engine), loss_and_gradients(plain.train()))


def test_adapters_train_with_swapped_blocks() -> None:
    losses = []
    for engine in (engine_of(train=LORA), swapped()):
        optimizer = torch.optim.AdamW([p for p in engine.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(3):
            for micro_step in range(2):
                loss = engine(make_batch(5, seed=micro_step))[0]
                loss.backward()
                found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        losses.append(found)
    assert losses[0] == losses[1] and losses[0][0] != losses[0][-2]


class Cuda:
    """No GPU is here: as much of CUDA's runtime as page-locking touches. A call that fails leaves its error, which
    the check after the next kernel takes, and raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.status, self.error, self.locked = status, 0, dict[int, int]()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(side_stream.torch, "zeros", self.kernel)

    def cudaHostRegister(self, address: int, size: int, _: int) -> int:  # noqa: N802
        self.error = self.status
        if not self.status:
            self.locked[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0

    def kernel(self, *_: Any, **__: Any) -> Any:
        error, self.error = self.error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")
        return SimpleNamespace(add_=lambda _: None)


def test_memory_that_cannot_be_locked_leaves_no_error_for_the_next_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = Cuda(monkeypatch, status=2)
    with caplog.at_level(logging.WARNING):
        assert not page_lock(host_memory(512))
    assert cuda.error == 0 and "could not be page-locked (CUDA error 2)" in caplog.text
    cuda.kernel()


def test_locked_memory_is_unlocked_with_it_and_by_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    memory, other = host_memory(512), host_memory(512)
    assert page_lock(memory) and page_lock(other) and len(cuda.locked) == 2
    del memory
    assert len(cuda.locked) == 1
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)  # a data worker lets go of what it inherited
    del other
    assert len(cuda.locked) == 1


def test_memory_for_copies_is_shared_with_forks_and_so_never_copied_for_them() -> None:
    """Linux copies private pages that a device has pinned at each fork."""
    memory = host_memory(1 << 20)
    begin, (seen, tell) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(begin[0], 1)
        os.write(tell, b"1" if int(memory[-1]) == 7 else b"0")
        os._exit(0)
    memory[-1] = 7  # a private page would now be two
    os.write(begin[1], b"x")
    assert os.read(seen, 1) == b"1"
    os.waitpid(child, 0)


def test_weights_that_visit_the_gpu_are_locked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, layer = Cuda(monkeypatch), torch.nn.Linear(3, 2)
    expected = [p.detach().clone() for p in layer.parameters()]
    tensors = list(layer.parameters())
    lock_weights(tensors)
    places = [p.data_ptr() for p in tensors]
    assert sorted(cuda.locked) == sorted(places)
    lock_weights(tensors)
    assert [p.data_ptr() for p in tensors] == places and all(map(torch.equal, tensors, expected))
    with on_device([layer], torch.device("cpu")):
        pass
    assert [p.data_ptr() for p in tensors] == places
    layer.double()  # new memory, which is locked in its turn
    lock_weights(tensors)
    assert {p.data_ptr() for p in layer.parameters()} == set(cuda.locked)
    del layer, tensors
    assert not cuda.locked


def test_where_one_tensor_cannot_be_locked_the_others_are_not_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Cuda(monkeypatch, status=2)
    layer = torch.nn.Linear(3, 2)
    for _ in range(2):
        lock_weights(list(layer.parameters()))
    assert caplog.text.count("could not be page-locked") == 1
