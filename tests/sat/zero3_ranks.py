"""Run by test_fixes_zero3.py on two gloo ranks: SAT's layers under ZeRO-3 without our repairs and with them.

    torchrun --nproc_per_node 2 zero3_ranks.py FOLDER

The first rank writes what was seen to FOLDER/result.json.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import yaml
from sat import mpu
from sat.model.base_model import BaseModel
from sat.model.finetune.lora2 import LoraMixin
from sat.mpu.layers import ColumnParallelLinear
from sat.training import deepspeed_training
from torch import Tensor, nn
from torch.utils.data import Dataset

from sat_ext.sat.arguments import initialize, parse_args
from sat_ext.sat.checkpoint.partitions import gather_weights, gathered_loading
from tests.sat.repairs import repair

WIDTH, LAYERS = 16, 2
NETWORK = Namespace(
    num_layers=LAYERS, vocab_size=4, hidden_size=WIDTH, num_attention_heads=2, max_sequence_length=8,
    layernorm_order="pre", skip_init=False, model_parallel_size=1,
)  # fmt: skip


BASE = "model.transformer.layers.0.attention.dense.original.weight"


class Engine(nn.Module):
    """As CogVideo's: a network of SAT's layers, changed by LoRA after it is built, and an encoder that is not."""

    def __init__(self, args: Any, lora: bool = True, params_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank())  # the first rank's weights must win
        self.model = BaseModel(NETWORK)
        self.whole_after_build = [n for n, p in self.model.named_parameters() if not hasattr(p, "ds_id")]
        if lora:
            self.model.add_mixin("lora", LoraMixin(LAYERS, r=2), reinit=True)
        self.conditioner = nn.Linear(WIDTH, 5).requires_grad_(False)
        self.conditioner.load_state_dict({"weight": torch.ones(5, WIDTH), "bias": torch.ones(5)})

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1])[None]
        outputs = self.model(tokens, positions, torch.ones(1, 1))[0]
        return outputs.float().square().mean() + self.conditioner.weight.mean()


class Tokens(Dataset[Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, item: int) -> Tensor:
        return torch.arange(4)  # always: the loss tells of the weights alone


def main(folder: Path) -> dict[str, Any]:
    args = arguments(folder)
    repair("no_compiler", args)
    initialize(args)
    result: dict[str, Any] = {"layer_without": layer_in_zero_init(args)}
    repair("parallel_layers", args)
    result["layer_with"] = layer_in_zero_init(args)

    result["build_without"] = caught(lambda: deepspeed_training.get_model(args, Engine, lora=False))
    repair("zero3_build", args)
    model = deepspeed_training.get_model(args, Engine)
    weights = gather_weights(model, lambda name: True)
    result["build"] = {
        "whole_after_build": model.whole_after_build,
        "whole": [n for n, p in model.named_parameters() if not hasattr(p, "ds_id")],
        "dtypes": sorted({str(p.ds_tensor.dtype) for p in model.parameters()}),
        "numbers": sum(p.ds_tensor.numel() for p in model.parameters()),
        "shapes": {n: list(w.shape) for n, w in weights.items()},
        "deviation": float(weights[BASE].std()) if weights else None,
    }

    state = {n: torch.full(list(p.ds_shape), float(i)) for i, (n, p) in enumerate(model.named_parameters())}
    plain = {n.replace(".original.", "."): w for n, w in state.items() if "matrix_" not in n}  # of a base model
    result["load_without"] = caught(lambda: model.load_state_dict(plain, strict=False))
    for given in (plain, state):
        with gathered_loading(model):
            missing, _ = model.load_state_dict(given, strict=False)
        got = gather_weights(model, lambda name: True)
        result.setdefault("load_wrong", []).append([
            n for n, w in got.items() if not torch.equal(w.float(), state[n]) and n not in missing
        ])  # fmt: skip

    for name in ("cpu_training", "load", "save", "lr_schedule"):
        repair(name, args)
    first = train(Engine(args, lora=False), arguments(folder))
    (run,) = (folder / "save").glob("run-*")
    result["saved"] = {n: list(w.shape) for n, w in saved(run)["module"].items()}
    result["trained"] = first
    args = arguments(folder, load=str(run), train_iters=4)
    with deepspeed.zero.Init(config_dict_or_path=args.deepspeed_config):  # as a user may give it
        again = engine_without_files(args)
    result["continued"] = train(again, args)
    args = arguments(folder, train_iters=4, experiment_name="unbroken")
    result["unbroken"] = train(Engine(args, lora=False), args)
    return result


def engine_without_files(args: Any) -> nn.Module:
    """`Engine` without what cannot be read inside of `zero.Init`."""
    engine = Engine.__new__(Engine)
    nn.Module.__init__(engine)
    engine.model = BaseModel(NETWORK)
    engine.conditioner = Constant()
    return engine


class Constant(nn.Module):
    """In the place of the encoder: its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, WIDTH), requires_grad=False)


def arguments(folder: Path, **changes: Any) -> Any:
    """SAT's, for ZeRO-3 in bf16 unless `changes` says otherwise."""
    config = {
        "model": {"network_config": {}},
        "args": {
            "experiment_name": "run", "train_iters": 3, "save": str(folder / "save"), "log_interval": 1,
            "save_interval": 1000, "warmup": 0.0, "lr_decay_style": "constant", "train_data": ["tokens"],
            "num_workers": 0, **changes,
        },
        "data": {"target": "tests"},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "steps_per_print": 10**9,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-2}},
        },
    }  # fmt: skip
    file = folder / f"config{os.environ['RANK']}.yaml"
    file.write_text(yaml.safe_dump(config))
    return parse_args(["--base", str(file)])


def train(model: nn.Module, args: Any) -> list[float]:
    """Losses of a model that is given to SAT's `training_main`."""
    args.iterable_dataset = args.iterable_dataset_eval = None
    losses = []

    def step(batches: Any, engine: Any, args: Any, timers: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = engine(next(batches))
        losses.append(round(float(loss.detach()), 5))
        return loss, {}

    deepspeed_training.training_main(
        args, model_cls=model, forward_step_function=step, create_dataset_function=lambda path, args: Tokens()
    )
    return losses


def layer_in_zero_init(args: Any) -> str:
    def build() -> str:
        with deepspeed.zero.Init(config_dict_or_path=args.deepspeed_config):
            layer = ColumnParallelLinear(4, 6, module=nn.Identity(), name="query", init_method=ones)
        with deepspeed.zero.GatheredParameters(list(layer.parameters())):
            return f"{list(layer.weight.shape)} {float(layer.weight.sum())}"

    return caught(build)


def ones(weight: Tensor, module: nn.Module, name: str) -> None:
    assert isinstance(module, nn.Identity) and name == "query"
    nn.init.ones_(weight)


def caught(function: Any) -> str:
    """What the function returned, or the error that ended it; the same on both ranks."""
    try:
        return str(function())
    except (TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def saved(run: Path) -> dict[str, Any]:
    tag = (run / "latest").read_text()
    state: dict[str, Any] = torch.load(run / tag / "mp_rank_00_model_states.pt", weights_only=True)
    return state


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = main(folder)
    assert mpu.get_data_parallel_world_size() == 2
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(found))
