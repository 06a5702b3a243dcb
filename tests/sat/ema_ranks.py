"""Run by test_ema.py: `EmaAdamW` on two gloo ranks against plain loops, in each of DeepSpeed's optimizers.

    python -m tests.sat.ema_ranks FOLDER

The ranks go through all cases in one process each, and write FOLDER/rank<r>.json: what failed, and how far off.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sat.training import deepspeed_training
from sat.training.deepspeed_training import get_optimizer_param_groups
from torch import Tensor

from sat_ext.models.packs import Group
from sat_ext.sat import divergence
from sat_ext.sat.checkpoint.partitions import gather_weights
from sat_ext.sat.checkpoint.reshard import own_pieces
from sat_ext.sat.ema import averaged
from sat_ext.sat.fixes.optimizer import of_its_path, optimizer_path
from tests.sat.memory_ranks import OFFLOAD, TRANSFORMER, WORLD, build, main

UPDATES, DECAY = 3, 0.24  # the first is below it, as the decay warms up
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "param_persistence_threshold": 100, "sub_group_size": 5000},
    "zero3-hpz": {"stage": 3, "param_persistence_threshold": 20, "zero_hpz_partition_size": 2},
    "zero2-offload": {"stage": 2, **OFFLOAD},
    "zero3-offload": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
    "zero2-fp16": {"stage": 2},
    "zero3-fp16": {"stage": 3},
    "zero1-fp32": {"stage": 1},  # gradients of bf16 weights, by DeepSpeed's BF16_Optimizer
}
CASES = [
    (name, mode, item)
    for name in ZERO
    for mode in (("full",) if "-" in name else ("lora", "full"))
    for item in ((2,) if name.endswith(("fp16", "fp32")) else (4, 2))
]


def case(name: str, mode: str, item: int) -> dict[str, Any]:
    """Train, and after each update leave for the averaged weights and come back."""
    dtype = torch.float32 if item == 4 else torch.float16 if "fp16" in name else torch.bfloat16
    config = {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**6, "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 128},
        "zero_optimization": {"reduce_bucket_size": 7000, "param_persistence_threshold": 20, **ZERO[name]},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "sat_ext.EmaAdamW", "params": {**ADAM, "ema_decay": DECAY}},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if name == "zero1-fp32" else {}),
    }  # fmt: skip
    args = Namespace(deepspeed_config=config)
    assert optimizer_path(args)
    network, plain = build(mode, item).to(dtype), Plain(mode)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    engine, optimizer = of_its_path(set_up, args, network)
    divergence.begin(engine)
    flat = masters(engine, optimizer)
    expected = [weight.detach().clone() for weight in flat]
    with averaged(engine):  # before the first update there is no average
        assert same(gathered(engine), before)
    assert same(gathered(engine), before)
    off = 0.0
    for update in range(1, UPDATES + 1):
        output = engine(sample(update, dist.get_rank(), dtype))[0]
        engine.backward(output.float().square().mean())
        engine.step()
        for average, weight in zip(expected, flat, strict=True):
            average.lerp_(weight.detach(), 1 - min(DECAY, (1 + update) / (10 + update)))
            assert torch.equal(engine.basic_optimizer.state[weight]["ema"], average)
        found = leave(engine, flat, dtype)
        if item == 4:
            off = max(off, plain.update(update, gathered(engine), found))
    engine.destroy()
    return {"off": off}


def set_up(args: Namespace, network: Any) -> Any:
    return deepspeed_training.deepspeed.initialize(
        model=network, model_parameters=groups(network), config=args.deepspeed_config
    )[:2]


def groups(network: Any) -> Any:
    """SAT's, which have scales in place of rates until its schedule begins."""
    return [{**group, "lr": ADAM["lr"]} for group in get_optimizer_param_groups(network)]


def masters(engine: Any, optimizer: Any) -> list[Tensor]:
    """What the optimizer updates, of this rank."""
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    return [weight for group in engine.basic_optimizer.param_groups for weight in group["params"]]


def gathered(engine: Any) -> dict[str, Tensor]:
    """All weights by name, on both ranks."""
    found = [gather_weights(engine.module, lambda name: True)]
    dist.broadcast_object_list(found)
    return found[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def leave(engine: Any, flat: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The averaged weights. Whatever is done with them, the training's are the same afterwards, bit for bit."""

    def state() -> list[Tensor]:
        states = (engine.basic_optimizer.state[weight].values() for weight in flat)
        return [t.detach().clone() for t in (*flat, *(value for values in states for value in values))]

    def look() -> Tensor:
        engine.eval()
        with torch.no_grad():
            output = engine(sample(0, 0, dtype))[0].clone()
        engine.train()
        return output

    weights, seen, states = gathered(engine), look(), state()
    with averaged(engine):
        found = gathered(engine)
        assert not torch.equal(look(), seen)
    assert same(gathered(engine), weights)
    assert torch.equal(look(), seen)
    assert all(torch.equal(a, b) for a, b in zip(states, state(), strict=True))
    for values, average in averages(engine, flat, found):
        assert torch.equal(values, average.to(values.dtype))
    return found


def averages(engine: Any, flat: list[Tensor], found: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each weight in `found`, and what the optimizer keeps of it."""
    kept = [engine.basic_optimizer.state[weight]["ema"] for weight in flat]
    if engine.zero_optimization_stage() == 0:
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        trained = [p for group in getattr(engine.optimizer, "fp16_groups", [flat]) for p in group]
        yield from ((found[names[p]], average) for p, average in zip(trained, kept, strict=True))
        return
    for piece in own_pieces(engine)[0]:
        values = found[piece.name].flatten()[piece.first : piece.first + piece.numel]
        yield values, kept[piece.group][piece.start : piece.start + piece.numel]


def sample(update: int, rank: int, dtype: torch.dtype) -> list[Group]:
    """What a rank trains on."""
    draws = torch.Generator().manual_seed(100 * update + rank)
    t = TRANSFORMER
    latents = torch.randn(1, 2, t.in_channels, 4, 4, generator=draws).to(dtype)
    text = torch.randn(1, t.max_text_seq_length, t.text_embed_dim, generator=draws).to(dtype)
    return [Group(latents=latents, text=text, timesteps=torch.tensor([3]), rotary=None)]


class Plain:
    """Torch's AdamW on the samples of both ranks, and the average of the weights after each update."""

    def __init__(self, mode: str) -> None:
        self.network = build(mode, 4)
        self.trained = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(groups(self.network), **ADAM)  # type: ignore[arg-type]

    def update(self, update: int, weights: dict[str, Tensor], averages: dict[str, Tensor]) -> float:
        """Update, and compare with what DeepSpeed has: the largest difference."""
        for weight in self.trained.values():
            weight.grad = torch.zeros_like(weight)  # as DeepSpeed, where a weight has no part in the loss
        for rank in range(WORLD):
            (self.network(sample(update, rank, torch.float32))[0].square().mean() / WORLD).backward()
        self.optimizer.step()
        decay = min(DECAY, (1 + update) / (10 + update))
        off = 0.0
        for name, weight in self.trained.items():
            self.average[name] = decay * self.average[name] + (1 - decay) * weight.detach()
            for own, found in ((weight, weights[name]), (self.average[name], averages[name])):
                off = max(off, float((own - found).abs().max()))
        return off


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), case, CASES))
