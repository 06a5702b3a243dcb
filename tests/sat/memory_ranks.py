"""Run by test_memory_states.py: what DeepSpeed allocates on two gloo ranks, for each kind of its optimizers.

    python -m tests.sat.memory_ranks FOLDER

The ranks go through all cases in one process each, and write FOLDER/rank<r>.json: bytes of unique storages.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from sat.training.deepspeed_training import get_optimizer_param_groups
from torch import Tensor

from sat_ext.memory.counts import count
from sat_ext.memory.run import Run, read_options
from sat_ext.memory.states import persistent, states
from sat_ext.models.config import ModelConfig, TextConfig, TrainConfig, TransformerConfig
from sat_ext.models.packs import Group
from sat_ext.models.transformer import build_transformer
from sat_ext.sat.ema import EmaAdamW
from tests.sat.ranks import free_port
from tests.sat.repairs import repair

WORLD = 2
# odd widths, so that groups and parameters need padding
TRANSFORMER = TransformerConfig(
    num_layers=2, num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=15,
    text_embed_dim=13, max_text_seq_length=5, sample_height=8, sample_width=8, sample_frames=5,
)  # fmt: skip
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}  # gradients of bf16 weights
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2-overlap": {"stage": 2, "overlap_comm": True},
    "zero3": {"stage": 3, "param_persistence_threshold": 100},
    "zero2-fp32": {"stage": 2},
    "zero3-fp32": {"stage": 3, "param_persistence_threshold": 100},
    "zero3-sub": {"stage": 3, "sub_group_size": 5000},
    "zero1-offload": {"stage": 1, **OFFLOAD},
    "zero2-offload": {"stage": 2, **OFFLOAD},
    "zero3-offload": {"stage": 3, **OFFLOAD},
    "zero0-ema": {"stage": 0},
    "zero2-ema": {"stage": 2},
    "zero3-ema": {"stage": 3, "param_persistence_threshold": 100},
    "zero2-offload-ema": {"stage": 2, **OFFLOAD},
    "zero3-offload-param": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
}
CASES = [
    (name, mode, item, steps)
    for name in ZERO
    for mode in ("lora", "full")
    for item in ((2,) if name.endswith(("fp32", "ema")) else (2, 4))
    for steps in ((1, 2) if name == "zero2" else (1,))
]


def nbytes(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of these, each once."""
    storages = {s.data_ptr(): s.nbytes() for t in tensors if isinstance(t, Tensor) for s in [t.untyped_storage()]}
    return sum(storages.values())


def run_of(mode: Any, item: int) -> Run:
    model = ModelConfig(
        transformer=TRANSFORMER, text=TextConfig(kind="byt5"), train=TrainConfig(mode=mode, rank=3),
    )  # fmt: skip
    return Run(model=model, steps={}, deepspeed={}, itemsize=item)


def build(mode: str, item: int) -> torch.nn.Module:
    """The network, the same each time."""
    torch.manual_seed(0)
    network = build_transformer(run_of(mode, item).model, torch.float32)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(mode == "full" or "lora_" in name)
    return network.train().to(torch.bfloat16 if item == 2 else torch.float32)


def case(name: str, mode: str, item: int, steps: int) -> dict[str, Any]:
    """What was allocated and what was predicted."""
    run = run_of(mode, item)
    offloaded = "offload" in name
    zero = {"reduce_bucket_size": 7000, "param_persistence_threshold": 20, **ZERO[name]}
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": steps, "steps_per_print": 10**6,
        "zero_optimization": zero, "zero_allow_untested_optimizer": True, "bf16": {"enabled": item == 2},
        "zero_force_ds_cpu_optimizer": False, **(FP32 if "fp32" in name else {}),
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-3}},
    }  # fmt: skip
    network = build(mode, item)
    given, make = config, None
    if "ema" in name:
        config["optimizer"] = {"type": "sat_ext.EmaAdamW"}
        given, make = {k: v for k, v in config.items() if k != "optimizer"}, EmaAdamW
    engine, optimizer, *_ = deepspeed.initialize(
        model=network, model_parameters=get_optimizer_param_groups(network), config=given, optimizer=make
    )
    seen = watch(engine, optimizer, zero["stage"])
    for _ in range(steps):
        seen |= backward(engine, optimizer, zero["stage"], item)
        engine.step()
    seen |= after_step(engine, optimizer, zero["stage"])
    if offloaded:  # a CPU is the host too
        seen = on_host(seen, zero)
    options, counts = read_options(config, 48), count(run)
    predicted = states(counts.groups, options, item, WORLD, dist.get_rank(), steps)
    whole = persistent([p.numel for p in counts.network], options, item, WORLD)
    engine.destroy()
    return {"seen": seen, "predicted": {**asdict(predicted), "persistent": whole}}


def watch(engine: Any, optimizer: Any, stage: int) -> dict[str, int]:
    """ZeRO-1 reduces at the end of a backward pass: what is there before. ZeRO-2 adds to what it has by then."""
    seen: dict[str, int] = {}
    if stage == 2:
        get = optimizer.get_all_grad_tensors

        def watched_get(*arguments: Any, **options: Any) -> Any:
            held = [*flat(optimizer.all_grad_tensors), *(p.grad for p in engine.module.parameters())]
            seen["accumulating"] = nbytes(held)
            return get(*arguments, **options)

        optimizer.get_all_grad_tensors = watched_get
    if stage == 1:
        reduce = optimizer.reduce_gradients

        def watched(*arguments: Any, **options: Any) -> None:
            seen["gradients"] = nbytes(p.grad for p in engine.module.parameters())
            reduce(*arguments, **options)

        optimizer.reduce_gradients = watched
    return seen


def backward(engine: Any, optimizer: Any, stage: int, item: int) -> dict[str, int]:
    dtype = torch.bfloat16 if item == 2 else torch.float32
    transformer = TRANSFORMER
    latents = torch.randn(1, 2, transformer.in_channels, 4, 4, dtype=dtype)
    text = torch.randn(1, transformer.max_text_seq_length, transformer.text_embed_dim, dtype=dtype)
    (output,) = engine([Group(latents=latents, text=text, timesteps=torch.tensor([3]), rotary=None)])
    engine.backward(output.float().square().mean())
    if stage == 0:
        return {"gradients": nbytes(p.grad for p in engine.module.parameters())}
    if stage == 1:
        return {}
    if stage == 2:
        return {"gradients": nbytes([*flat(optimizer.averaged_gradients), *flat(optimizer.all_grad_tensors)])}
    return {
        "gradients": nbytes([optimizer.grad_partitions_flat_buffer]),
        "bucket": nbytes(b.buffer for b in optimizer.ipg_buckets.values()),
    }


def flat(values: Any) -> Iterator[Any]:
    if isinstance(values, Tensor):
        yield values
        return
    for value in values.values() if isinstance(values, dict) else values or ():
        yield from flat(value)


def after_step(engine: Any, optimizer: Any, stage: int) -> dict[str, int]:
    parameters: list[Any] = [p for p in engine.module.parameters() if p.requires_grad]
    if stage == 3:
        weights = [p.ds_tensor for p in parameters]
        master, inner = optimizer.fp32_partitioned_groups_flat, optimizer.optimizer
    elif stage:
        weights, master, inner = parameters, optimizer.single_partition_of_fp32_groups, optimizer.optimizer
    else:
        weights, master = parameters, [t for g in getattr(optimizer, "fp32_groups", []) for t in g]
        inner = getattr(optimizer, "optimizer", optimizer)
    moments = [t for s in inner.state.values() for k, t in s.items() if k in ("exp_avg", "exp_avg_sq", "ema")]
    shared = {t.untyped_storage().data_ptr() for t in weights}
    seen = {
        "weights": nbytes(weights),
        "master": nbytes(t for t in master if t.untyped_storage().data_ptr() not in shared),
        "moments": nbytes(moments),
        "host_gradients": nbytes(t.grad for t in master),
    }
    if stage == 3:
        small = optimizer.persistent_parameters
        seen["persistent"] = sum(p.data.numel() * p.element_size() for p in small)
    for name in ("param_buffer_of_bit16_for_cpu_offload_groups", "temp_grad_buffer_for_cpu_offload"):
        seen[name] = nbytes(flat(getattr(optimizer, name, None)))
    return seen


def on_host(seen: dict[str, int], zero: dict[str, Any]) -> dict[str, int]:
    """What would be in the memory of the GPU's host."""
    host = {
        "host_optimizer": seen["master"] + seen["moments"] + seen["param_buffer_of_bit16_for_cpu_offload_groups"],
        "host_gradients": seen["host_gradients"] + seen["temp_grad_buffer_for_cpu_offload"],
    }
    if zero["stage"] == 3:
        host["host_gradients"] += seen["gradients"]
    weights = "host_weights" if "offload_param" in zero else "weights"
    return {**host, weights: seen["weights"]}


def rank_main(rank: int, folder: Path, port: int, case: Callable[..., Any], cases: Sequence[Any]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    repair("no_compiler", Namespace())
    deepspeed.init_distributed("gloo")
    results: dict[str, Any] = {}
    for values in cases:
        try:
            results["-".join(map(str, values))] = case(*values)
        except Exception:
            results["-".join(map(str, values))] = {"error": traceback.format_exc()}
    (folder / f"rank{rank}.json").write_text(json.dumps(results))


def main(folder: Path, case: Callable[..., Any] = case, cases: Sequence[Any] = CASES) -> int:
    """Fork the ranks, so that imports are paid for once."""
    port, pids = free_port(), []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            try:
                rank_main(rank, folder, port, case, cases)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
