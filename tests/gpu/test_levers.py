"""Each lever on a GPU against the plain engine there, by `benchmarks/gpu.py`. Without a GPU they are skipped."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sat_ext.models.folder import load_model_config
from sat_ext.models.quantize import QuantizedLinear
from sat_ext.models.side_stream import host_memory, page_lock
from sat_ext.models.t5 import build_text
from tests.models.conftest import make_batch, pretrained, small_config  # noqa: F401, a fixture
from tests.models.test_checkpointing import LORA

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: tests/gpu needs one")
OFFLOAD = {"offload": True}
# 64 numbers a head and 4 heads: wide enough for quantized layers and for copies that take longer than a kernel
WIDE = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 5, "in_channels": 32}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()
    torch.cuda.empty_cache()


def wide(**changes: Any) -> Any:
    from tests.models import conftest

    transformer = {**conftest.FAMILIES["5b-i2v"]["transformer"], **WIDE}
    engine = conftest.make_engine(small_config("5b-i2v", transformer=transformer, **changes))
    for name, parameter in engine.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return engine.to(GPU)


def batch(seed: int = 3) -> dict[str, Any]:
    found = make_batch(9, seed=seed)
    return {k: v.to(GPU) if isinstance(v, Tensor) else v for k, v in found.items()}


def trained(engine: Any, steps: int = 3) -> dict[str, Tensor]:
    """Losses, and the adapters after some steps: a wrong gradient shows in both."""
    optimizer = torch.optim.AdamW([p for p in engine.parameters() if p.requires_grad], lr=1e-3)
    found = {}
    for step in range(steps):
        loss = engine(batch(step))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[f"loss {step}"] = loss.detach()
    return found | {n: p.detach() for n, p in engine.named_parameters() if p.requires_grad}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp8"])
@pytest.mark.parametrize("offload", [False, True])
def test_swapped_blocks_train_as_resident_ones(quantization: str, offload: bool) -> None:
    train = {**LORA, "quantization": quantization}
    expected = trained(wide(train=train))
    for count in (3, 5):
        lever = {"offload": offload}
        assert_close(trained(wide(train=train, block_swap=count, gradient_checkpointing=lever)), expected)


@pytest.mark.parametrize("mode", [LORA, {"mode": "full"}], ids=["lora", "full"])
def test_offloaded_inputs_train_as_kept_ones(mode: dict[str, Any]) -> None:
    expected = trained(wide(train=mode))
    for lever in (True, OFFLOAD, {"every": 2, **OFFLOAD}):
        assert_close(trained(wide(train=mode, gradient_checkpointing=lever)), expected)


@pytest.mark.parametrize(("quantization", "most"), [("nf4", 0.6), ("fp8", 0.2)])
def test_a_quantized_base_predicts_nearly_as_the_plain_one_in_less_memory(quantization: str, most: float) -> None:
    plain = wide(train=LORA)
    used = torch.cuda.memory_allocated()
    engine = wide(train={**LORA, "quantization": quantization})
    assert torch.cuda.memory_allocated() - used < 0.75 * used
    found = [e.eval()(batch())[0] for e in (engine, plain)]
    assert found[0].isfinite() and (found[0] - found[1]).abs() < most * found[1]
    layer = next(m for m in engine.modules() if isinstance(m, QuantizedLinear))
    inputs = torch.randn(7, layer.in_features)
    there = layer(inputs.to(GPU)).cpu()  # the same codes, other kernels
    torch.testing.assert_close(there, layer.to("cpu")(inputs), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "on_off"])
def test_text_off_the_gpu_embeds_as_on_it(pretrained: Callable[..., Path], device: str) -> None:  # noqa: F811
    base = {"pretrained": str(pretrained()), "conditioning": "i2v"}
    plain = build_text(load_model_config(base), torch.float32).to(GPU)
    text = build_text(load_model_config({**base, "text": {"device": device}}), torch.float32).to(GPU)
    for captions in (["ab", "", "ab"], ["cd", "ab"]):
        found = text.encode(captions, GPU, torch.float32)
        torch.testing.assert_close(found, plain.encode(captions, GPU, torch.float32), rtol=1e-3, atol=1e-4)
        assert {p.device.type for p in text.encoder.parameters()} == {"cpu"}
    assert device == "cpu" or all(p.is_pinned() for p in text.encoder.parameters())


def test_locked_memory_copies_right_and_a_failure_leaves_no_error() -> None:
    memory = host_memory(64 << 20)
    memory.copy_(torch.arange(64 << 20, dtype=torch.int64).to(torch.uint8))
    assert page_lock(memory) and memory.is_pinned()
    assert not page_lock(memory)  # it is already: CUDA error 712
    there = memory.to(GPU, non_blocking=True)
    assert (there + 0).sum().item() == memory.sum().item()


def test_one_lora_step_of_the_tiny_model_by_the_entry_script(tmp_path: Path) -> None:
    """Under DeepSpeed, with all levers and without; memory.json then has figures, and segments grow."""
    command = [sys.executable, "-m", "sat_ext.cli.main", "demo", str(tmp_path / "data")]
    command += ["--clips", "8", "--stills", "8"]
    environment = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, timeout=120)
    seen = []
    levers = {"gradient_checkpointing": OFFLOAD, "block_swap": 3, "text": {"device": "cpu"}}
    for name, model in (("plain", {}), ("levers", levers)):
        own = {
            "args": {
                "train_data": [str(tmp_path / "data" / "train")], "valid_data": None, "eval_interval": None,
                "train_iters": 3, "save": str(tmp_path / name), "save_interval": None, "experiment_name": name,
                "num_workers": 0, "log_interval": 1,
            },
            "model": {
                "train": {"mode": "lora", "rank": 4, "alpha": 4}, "sampling": {"number": 0},
                "transformer": {"num_layers": 4}, **model,
            },
            "data": {"params": {"sources": [{"name": "all", "path": str(tmp_path / "data" / "train")}]}},
        }  # fmt: skip
        file = tmp_path / f"{name}.json"  # which YAML reads
        file.write_text(json.dumps(own))
        files = ("model/tiny", "data/demo", "zero/zero1", "train/demo")
        base = [*(str(ROOT / "configs" / f"{f}.yaml") for f in files), str(file)]
        done = subprocess.run(
            [sys.executable, "train_video.py", "--base", *base], cwd=ROOT, env=environment, capture_output=True,
            text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        assert "repaired 'expandable_segments'" in done.stdout + done.stderr
        (report,) = (tmp_path / name).glob("*/memory.json")
        buckets = json.loads(report.read_text())["buckets"]
        assert buckets and all(b["first"] or b["allocated"] for b in buckets)
        seen.append([b["bucket"] for b in buckets])
    assert seen[0] == seen[1]
