"""What SAT's loop or DeepSpeed does not survive in the `deepspeed` section is refused at the start."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from sat_ext.errors import ConfigError
from sat_ext.sat.arguments import parse_args
from sat_ext.sat.run import run_of
from sat_ext.sat.section import check_section
from tests.sat.ranks import Server, finish
from tests.sat.runs import QUICK

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = [str(CONFIGS / f) for f in ("model/tiny.yaml", "data/joint.yaml", "zero/zero1.yaml", "train/full.yaml")]
BOTH = [  # under our script and under CogVideo's
    (
        {"scheduler": {"type": "WarmupLR"}},
        "deepspeed.scheduler: SAT sets the learning rate itself, and two",
    ),
    ({"fp16": {"enabled": True}}, r"deepspeed.fp16.enabled: bf16 is on too, .* write 'bf16: {enabled: false}'"),
    (
        {"train_batch_size": 7},
        r"7 is not train_micro_batch_size_per_gpu \(1\) x gradient_acc.* \(1\) x 1 ranks",
    ),
    ({"data_types": {"grad_accum_dtype": "fp33"}}, "grad_accum_dtype: 'fp33' is not one of fp32, fp16"),
    ({"data_types": {"param_dtype": "fp32"}}, "param_dtype: fp32, and the run trains in bf16"),
    (
        {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 0}},
        "data_types.grad_accum_dtype: fp32 beside weights in bf16 needs ZeRO stage 1, 2 or 3",
    ),
    (
        {"fp16": {"enabled": True}, "bf16": {"enabled": False}, "zero_optimization": {"stage": 0}},
        "deepspeed.fp16.enabled: without ZeRO DeepSpeed does not scale the loss; use ZeRO stage 1",
    ),
    (
        {"optimizer": {"type": "AdamX"}},
        "type: 'AdamX' is in neither DeepSpeed nor",
    ),
    ({"optimizer": {"params": {"max_grad_norm": 1}}}, "max_grad_norm: write deepspeed.gradient_clipping instead"),
    ({"zero_optimization": {"stag": 2}}, "does not take this section: stag: Extra inputs are not permitted"),
    (
        {"zero_optimization": {"stage": 7}},
        "does not take this section: stage: Input should be",
    ),
    ({"communication_data_type": "fp8"}, "this section: Invalid communication_data_type"),
    (
        {"progressive_layer_drop": {"enabled": True}},
        "unknown key 'progressive_layer_drop'; valid keys:",
    ),
    ({"gradient_predivide_factor": 2}, "deepspeed: unknown key 'gradient_predivide_factor'"),
    ({"flops_profiler": {"enabled": True}}, "deepspeed: unknown key 'flops_profiler'"),
    ({"curriculum_learning": {"enabled": True}}, "deepspeed: unknown key 'curriculum_learning'"),
    ({"bf16": True}, "deepspeed.bf16: expected a mapping, got True"),
    ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage: 'two' is not one of 0, 1, 2, 3"),
    ({"optimizer": {"params": {"lr": "auto"}}}, "optimizer.params.lr: expected float, got 'auto'"),
    ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps: expected int, got 'auto'"),
]


@pytest.mark.parametrize(("section", "message"), BOTH, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_a_section_that_cannot_train_is_refused(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"deepspeed": section}))
    with pytest.raises(ConfigError, match=message):
        parse_args(["--base", *TINY, str(file)])


@pytest.mark.parametrize(("section", "message"), BOTH, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_cogvideos_script_refuses_it_too(
    sat_args: Callable[..., Namespace], section: dict[str, Any], message: str
) -> None:
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW"}, "loss_scale": 0,
    }  # fmt: skip
    merged = {
        k: {**base[k], **v} if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in section.items()
    }
    args = sat_args(
        model_config={"network_config": {}}, deepspeed_config={**base, **merged}, batch_size=1,
        gradient_accumulation_steps=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        run_of(args)


def test_cogvideos_section_passes(sat_args: Callable[..., Namespace], tmp_path: Path) -> None:
    """As in its sft.yaml; SAT multiplies by the accumulation steps, which may be left out."""
    section = {
        "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "fp16": {"enabled": False},
        "hysteresis": 2, "loss_scale": 0, "loss_scale_window": 400, "min_loss_scale": 1, "train_batch_size": 2,
        "zero_optimization": {"stage": 2, "cpu_offload": False}, "optimizer": {"type": "sat.ops.FusedEmaAdam"},
        "activation_checkpointing": {"partition_activations": False},
    }  # fmt: skip
    file = tmp_path / "a.yaml"
    file.write_text("args: {gradient_accumulation_steps: 4}\n")
    args = sat_args(
        model_config={"network_config": {}}, deepspeed_config=section, gradient_accumulation_steps=None,
        base=[str(file)],
    )  # fmt: skip
    run_of(args)
    assert args.gradient_accumulation_steps == 1
    args = sat_args(
        model_config={"network_config": {}}, deepspeed_config={**section, "gradient_accumulation_steps": 1},
        base=[str(file)],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"4, but deepspeed.gradient_accumulation_steps is 1"):
        run_of(args)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            "4, but deepspeed.gradient_accumulation_steps is 1 and takes precedence",
        ),
        ({"batch_size": 2}, "args.batch_size: 2, but deepspeed.train_micro_batch_size_per_gpu is 1"),
        ({"lr": 1}, "args.lr: 1.0, but deepspeed.optimizer.params.lr is 1e-05"),
    ],
)
def test_a_value_in_two_places_is_refused_where_they_differ(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({"args": settings}))
    with pytest.raises(ConfigError, match=message):
        parse_args(["--base", *TINY, str(file)])
    (name, value), *_ = settings.items()
    args = parse_args(["--base", *TINY, str(file), f"--{name.replace('_', '-')}", "3"])  # a flag beats both
    assert getattr(args, name) == 3


def test_a_device_without_fp16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    for there in (True, False):
        monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _, there=there: there)
        if there:
            check_section(section, 1, checkpoints_activations=False)
    with pytest.raises(ConfigError, match="deepspeed.fp16.enabled: this device does not train in fp16; use bf16"):
        check_section(section, 1, checkpoints_activations=False)


def test_activation_checkpointing_that_would_change_nothing_is_refused() -> None:
    section = {
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"},
        "activation_checkpointing": {"cpu_checkpointing": True},
    }  # fmt: skip
    check_section(section, 1, checkpoints_activations=True)
    with pytest.raises(ConfigError, match=r"cpu_checkpointing: this engine does not check"):
        check_section(section, 1, checkpoints_activations=False)


@pytest.mark.multiprocess
def test_the_allowed_keys_train(server: Server, configure: Callable[..., list[str]], tmp_path: Path) -> None:
    """All at once, and the optimizer left without a type."""
    section = {
        "train_batch_size": 2, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32", "steps_per_print": 1, "wall_clock_breakdown": True, "dump_state": True,
        "zero_force_ds_cpu_optimizer": True, "aio": {"block_size": 1048576},
        "checkpoint": {"tag_validation": "Fail"}, "activation_checkpointing": {"cpu_checkpointing": False},
    }  # fmt: skip
    file = tmp_path / "more.yaml"
    file.write_text(json.dumps({"deepspeed": section}))
    run = server.start([*configure(tmp_path, stage=2, **QUICK), str(file)], world=2, folder=tmp_path)
    finish(run)
    losses = [float.fromhex(r["loss"]) for r in run.records()]
    assert len(set(losses)) == 4
