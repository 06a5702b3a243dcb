"""What the optimizer sees is the mean over an update's samples, each of which counts alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sat_ext.models.engine import VideoDiffusionEngine
from sat_ext.types import groups_of
from tests.sat.ranks import Server, finish
from tests.sat.runs import MODEL, QUICK

WEIGHTS = {"image": 0.5, "video": 2.0}
TRAIN = {"full": {"mode": "full"}, "lora": {"mode": "lora", "rank": 4, "alpha": 4}}


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", TRAIN)
def test_the_gradient_of_an_update_is_that_of_its_samples_one_by_one(
    server: Server, configure: Callable[..., list[str]], tmp_path: Path, stage: int, world: int, accumulate: int,
    mode: str,
) -> None:  # fmt: skip
    model = {**MODEL, "loss_weights": WEIGHTS, "train": TRAIN[mode]}
    logs = {"log_interval": 1, "gradient_norms": stage < 3}
    files = configure(tmp_path, stage=stage, accumulate=accumulate, checkpoint="weights", **QUICK, **logs)
    more = tmp_path / "more.yaml"
    more.write_text(
        json.dumps(
            {
                "model": model,
                "data": {"params": {"video_size": [32, 32], "fps": 8, "max_num_frames": 9}},
                "deepspeed": {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.01},
            }
        )
    )
    run = server.start([*files, str(more)], world=world, folder=tmp_path, gradients=True)
    finish(run, (0,) * world)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
    assert [len(rank["batches"]) for rank in ranks] == [accumulate] * world
    kinds = {kind for rank in ranks for batch in rank["batches"] for g in groups_of(batch) for kind in g["kind"]}
    assert kinds == {"image", "video"}
    of_kinds = one_by_one(model, ranks, ranks[0]["samples"] * accumulate)
    expected = {name: sum(of[name] for of in of_kinds.values()) for name in of_kinds["image"]}
    found = ranks[0]["gradients"]
    assert found.keys() == expected.keys()
    norm = norm_of(expected)
    off = norm_of({name: found[name] - gradient for name, gradient in expected.items()})
    assert norm > 0 and off <= 1e-5 * norm, f"{off / norm} off"
    log = run.log()
    assert logged(log, "grad_norm") == pytest.approx(norm, rel=1e-4)
    assert logged(log, "clipped") == float(norm > 0.01)
    if stage < 3 and world * accumulate == 1:  # of a micro-step, and here that is the update
        for kind, gradient in of_kinds.items():
            assert logged(log, f"gradient_{kind}") == pytest.approx(norm_of(gradient), rel=1e-4)


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


def logged(log: str, name: str) -> float:
    """The value that SAT's line on the first iteration has."""
    found = re.search(rf"\b{name} ([-+.\dE]+)", log)
    assert found is not None, log[-3000:]
    return float(found[1])


def one_by_one(model: dict[str, Any], ranks: list[Any], samples: float) -> dict[str, dict[str, torch.Tensor]]:
    """Each kind's part of the gradient by plain PyTorch: of each sample's loss on its own, weighted by kind alone,
    summed, and divided by the mean number of samples."""
    engine = VideoDiffusionEngine(SimpleNamespace(model_config=model)).train()
    parameters = dict(engine.named_parameters())
    assert parameters.keys() == ranks[0]["weights"].keys()
    for name, weight in ranks[0]["weights"].items():
        parameters[name].data.copy_(weight)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    total = {kind: {name: torch.zeros_like(p) for name, p in trained.items()} for kind in WEIGHTS}
    for batch in [batch for rank in ranks for batch in rank["batches"]]:
        groups = groups_of(batch)
        kinds = [kind for group in groups for kind in group["kind"]]
        losses = torch.cat(engine._training_losses(groups, batch["seed"]))
        for kind, loss in zip(kinds, losses, strict=True):
            gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
            for name, gradient in zip(trained, gradients, strict=True):
                total[kind][name] += WEIGHTS[kind] * gradient / samples
    return total
