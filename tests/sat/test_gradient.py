"""What the optimizer sees is the mean over an update's samples, each of which counts alike."""

from __future__ import annotations

import json
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
@pytest.mark.parametrize(
    ("world", "accumulate", "mode"), [(1, 1, "lora"), (1, 3, "full"), (2, 1, "full"), (2, 3, "lora")]
)
def test_the_gradient_of_an_update_is_that_of_its_samples_one_by_one(
    server: Server, configure: Callable[..., list[str]], tmp_path: Path, stage: int, world: int, accumulate: int,
    mode: str,
) -> None:  # fmt: skip
    model = {**MODEL, "loss_weights": WEIGHTS, "train": TRAIN[mode]}
    files = configure(tmp_path, stage=stage, accumulate=accumulate, checkpoint="weights", **QUICK)
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
    expected = one_by_one(model, ranks, ranks[0]["samples"] * accumulate)
    found = ranks[0]["gradients"]
    assert found.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    off = torch.stack([(found[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    assert norm > 0 and off <= 1e-5 * norm, f"{off / norm} off"


def one_by_one(model: dict[str, Any], ranks: list[Any], samples: float) -> dict[str, torch.Tensor]:
    """The gradient by plain PyTorch: of each sample's loss on its own, weighted by kind alone, summed, and divided
    by the mean number of samples."""
    engine = VideoDiffusionEngine(SimpleNamespace(model_config=model)).train()
    parameters = dict(engine.named_parameters())
    assert parameters.keys() == ranks[0]["weights"].keys()
    for name, weight in ranks[0]["weights"].items():
        parameters[name].data.copy_(weight)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for batch in [batch for rank in ranks for batch in rank["batches"]]:
        groups = groups_of(batch)
        kinds = [kind for group in groups for kind in group["kind"]]
        losses = torch.cat(engine._training_losses(groups, batch["seed"]))
        for kind, loss in zip(kinds, losses, strict=True):
            gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
            for name, gradient in zip(trained, gradients, strict=True):
                total[name] += WEIGHTS[kind] * gradient / samples
    return total
