"""Samples whose target is the base: what the model predicts without its LoRA, of the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sat_ext.models import engine as module
from sat_ext.models.config import ABSENT
from sat_ext.models.transformer import adapters_off
from tests.models.conftest import FAMILIES, make_batch, make_engine, small_config

LEVERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "nf4": {"train": {"quantization": "nf4"}},
    "fp8": {"train": {"quantization": "fp8"}},
    "dora": {"train": {"target_modules": "all-linear", "dora": True}},
    "swapped": {"block_swap": 3, "gradient_checkpointing": True},
}


def pack() -> dict[str, Any]:
    """Stills, and clips of which every other is the base's."""
    return {
        "seed": 3,
        "groups": [
            make_batch(1, target=["data", "data"]),
            make_batch(9, count=3, target=["base", "data", "base"]),
            make_batch(5, count=1, target=["base"]),
        ],
    }


def lora_engine(family: str, *, zero: bool, **levers: Any) -> Any:
    train = {"mode": "lora", "rank": 4, "alpha": 4, **levers.pop("train", {})}
    config = small_config(family, train=train, **levers)
    config["transformer"] = {**config["transformer"], "num_layers": 4}
    engine = make_engine(config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in engine.named_parameters():
        if "lora_B" in name and not zero:
            weight.data.normal_(generator=generator)
    return engine


def compared(engine: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Prediction and target of each group."""
    seen: list[tuple[Tensor, Tensor]] = []
    losses = module.velocity_losses

    def watched(prediction: Tensor, target: Tensor, padding: int = 0) -> Tensor:
        seen.append((prediction.detach().clone(), target.clone()))
        return losses(prediction, target, padding)

    with monkeypatch.context() as patched:
        patched.setattr(module, "velocity_losses", watched)
        engine._training_losses(batch["groups"], batch["seed"])
    return seen


@pytest.mark.parametrize("levers", LEVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_is_the_model_without_its_lora(
    family: str, levers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_base = compared(lora_engine(family, zero=True, **LEVERS[levers]), pack(), monkeypatch)
    trained = lora_engine(family, zero=False, **LEVERS[levers])
    of_data = compared(
        trained, {**pack(), "groups": [make_batch(1), make_batch(9, 3), make_batch(5, 1)]}, monkeypatch
    )
    found = compared(trained, pack(), monkeypatch)
    for group, (prediction, target), (base, _), (same, data) in zip(pack()["groups"], found, of_base, of_data):
        assert torch.equal(prediction, same)
        for i, told_by in enumerate(group["target"]):
            if told_by == "base":
                torch.testing.assert_close(target[i], base[i].float(), rtol=1e-4, atol=1e-5)
                assert not torch.allclose(target[i], prediction[i], atol=1e-3)
            else:
                assert torch.equal(target[i], data[i])


def test_a_new_lora_has_nothing_to_learn_from_its_base_and_its_loss_is_apart() -> None:
    engine = lora_engine("5b-i2v", zero=True)
    _, metrics = engine(pack())
    assert metrics["loss_base"] == 0 and metrics["loss_image"] > 0 and metrics["loss_video"] > 0
    loss, _ = engine({"seed": 0, "groups": [make_batch(9, target=["base", "base"])]})
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in engine.parameters() if p.grad is not None)
    assert "loss_base" not in engine({"seed": 0, "groups": [make_batch(9)]})[1]


def test_it_pulls_the_model_back_to_its_base() -> None:
    engine = lora_engine("5b", zero=False)
    trained = [p for p in engine.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.05, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss, metrics = engine(make_batch(9, target=["base", "base"]))
        losses.append(float(metrics["loss_base"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.requires_grad for p in trained) and losses[-1] < 0.2 * losses[0]


def test_evaluations_look_at_the_data() -> None:
    engine = lora_engine("5b", zero=False).eval()
    assert engine(make_batch(9, target=["base", "data"])) == engine(make_batch(9))


def test_the_key_alone_decides_which_metrics_a_rank_has() -> None:
    """SAT reduces them by name: ranks whose samples differ in their targets would wait for each other."""
    engine = lora_engine("5b", zero=False)
    of_data, of_base = (
        engine({**make_batch(9, target=[target] * 2), "gradient_norms": True})[1] for target in ("data", "base")
    )
    assert list(of_data) == list(of_base)
    assert of_data["loss_base"] == of_data["gradient_base"] == of_base["loss_video"] == ABSENT


def test_the_adapters_are_on_again_after_the_outermost_block_even_after_an_error() -> None:
    network = lora_engine("5b", zero=False).network
    layer = network.transformer_blocks[0].attn1.to_q
    with pytest.raises(RuntimeError), adapters_off(network):
        with adapters_off(network):
            pass
        assert layer.disable_adapters
        raise RuntimeError
    assert not layer.disable_adapters
