"""Which configuration is recommended, and which lever first where none fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sat_ext.memory.advice import Room, advise, cache_that_fits, first_that_fits, slowdown, with_zero
from sat_ext.memory.levers import levers
from sat_ext.memory.plan import make_plan, plan_cache
from sat_ext.memory.run import Run, run_from
from sat_ext.memory.table import as_data, sentences
from sat_ext.recipe import recipe_of
from sat_ext.zero import ZERO_NAMES
from tests.test_memory_plan import _config, run_of

GB = 1_000_000_000


def room(gpu: float, host: float = 1000, gpus: int = 1) -> Room:
    return Room(gpus=gpus, per_node=gpus, gpu_memory=int(gpu * GB), host_memory=int(host * GB))


def test_every_zero_configuration_is_planned() -> None:
    advice = advise(run_of(), room(80))
    assert [plan.name for plan in advice.plans] == ["given", *ZERO_NAMES]
    assert advice.recommended in ZERO_NAMES
    assert all(plan.slowdown >= 1 for plan in advice.plans)


@pytest.mark.parametrize(("train", "gpus", "gpu"), [("lora", 1, 80), ("full", 8, 80), ("full", 8, 48)])
def test_the_least_slow_that_fits_is_recommended(train: str, gpus: int, gpu: int) -> None:
    there = room(gpu, gpus=gpus)
    advice = advise(run_of(train=train), there)
    fitting = {p.name: round(p.slowdown, 2) for p in advice.plans if there.holds(p) and p.name != "given"}
    assert advice.recommended in fitting
    assert fitting[advice.recommended] == min(fitting.values())


def test_what_moves_more_is_slower() -> None:
    run = run_of(train="full")
    names = ("zero2", "zero3")
    plain, split = (slowdown(changed, 8) for n in names if (changed := with_zero(run, n)))
    assert plain == 1.0 < split
    offloaded = with_zero(run, next(n for n in ZERO_NAMES if n.startswith("zero2-offload")))
    assert offloaded is not None
    assert slowdown(offloaded, 1) > slowdown(offloaded, 8) > 1.0  # eight GPUs share the work of the CPU's Adam


def test_levers_that_are_named_are_enough_and_none_is_too_many() -> None:
    run, there = run_of(), room(7, host=64)
    advice = advise(run, there)
    assert advice.recommended is None and advice.levers and advice.with_levers
    assert there.holds(advice.with_levers)
    known = {lever.yaml: lever for lever in levers(run)}
    for left_out in advice.levers:
        less: Run = run
        for name in advice.levers:
            less = less if name == left_out else known[name].pull(less)
        configurations = [changed for n in ZERO_NAMES if (changed := with_zero(less, n)) is not None]
        assert not any(there.holds(make_plan(r)) for r in configurations), left_out


def test_the_cheapest_lever_comes_first() -> None:
    model = run_of().model
    first_stage = replace(model.first_stage, slicing=False)
    run = replace(run_of(), model=replace(model, gradient_checkpointing=False, first_stage=first_stage))
    names = [lever.yaml.split(":")[0] for lever in levers(run)]
    order = [
        "model.first_stage.slicing", "model.gradient_checkpointing", "model.text.device",
        "deepspeed.optimizer.type", "model.train.quantization", "model.block_swap",
    ]  # fmt: skip
    assert sorted(order, key=names.index) == order


def test_levers_that_are_pulled_or_make_no_sense_are_not_named() -> None:
    full = [lever.yaml for lever in levers(run_of(train="full"))]
    assert not any("quantization" in name or "block_swap" in name for name in full)
    assert "model.gradient_checkpointing: true" not in full  # the YAML has it
    original = [lever.yaml for lever in levers(run_from(recipe_of(_config())))]
    assert original == [
        "configs/cogvideo/joint.yaml (ChunkedFirstStage)",
        "configs/cogvideo/cached.yaml, with what sat-ext cache made",
        "configs/cogvideo/offload-text.yaml",
    ]


def test_optimizers_are_not_combined_with_an_offload_that_they_do_not_survive() -> None:
    run = run_of()
    eight = replace(run, deepspeed={**run.deepspeed, "optimizer": {"type": "bitsandbytes.optim.AdamW8bit"}})
    assert with_zero(eight, "zero2") is not None
    assert with_zero(eight, next(n for n in ZERO_NAMES if n.startswith("zero2-offload"))) is None
    averaging = replace(run, deepspeed={**run.deepspeed, "optimizer": {"type": "sat_ext.EmaAdamW"}})
    assert with_zero(averaging, "zero3-offload") is not None
    assert with_zero(averaging, "zero3-nvme") is None
    quantized = replace(run, model=replace(run.model, train=replace(run.model.train, quantization="nf4")))
    assert with_zero(quantized, "zero3") is None


@pytest.mark.parametrize(
    ("gpu", "levers"),
    [
        (16, ()),  # T5 and autoencoder together take more
        (12, ()),
        (8, ("model.text.quantization: nf4", "model.first_stage.frames: 4")),
        (5, ("model.text.device: cpu", "model.first_stage.tiling: true")),
    ],
)
def test_the_cache_can_be_made_on_the_gpus_that_need_it(gpu: int, levers: tuple[str, ...]) -> None:
    run = replace(run_of(), cached=True, cached_text=True)  # the YAML may train from it already
    plan = cache_that_fits(run, 1, gpu * GB)
    assert plan.levers == levers and plan.gpu <= gpu * GB
    whole = plan_cache(run, 1)
    assert whole.text > 9.5 * GB and whole.gpu == max(whole.text, whole.first_stage)
    assert whole.text + whole.first_stage > 16 * GB


def test_cogvideos_cache_needs_its_own_levers() -> None:
    run = run_from(recipe_of(_config()))
    assert plan_cache(run, 1).gpu > 16 * GB  # of CogVideo's own first stage, which has no chunks
    assert cache_that_fits(run, 1, 16 * GB).levers == ("configs/cogvideo/joint.yaml (ChunkedFirstStage)",)
    plan = cache_that_fits(run, 8, 8 * GB)
    text, first_stage = plan.levers
    assert text == "configs/cogvideo/offload-text.yaml" and first_stage.endswith("{frames: 4, recompute: level}")
    assert plan.gpu <= 8 * GB and plan.host > 8 * 9.5 * GB  # each rank holds T5


def test_where_nothing_helps_the_largest_part_is_named() -> None:
    there = room(1)
    assert first_that_fits(run_of(), there) == ((), None)
    lines = sentences(advise(run_of(), there), there)
    assert lines[0] == "Nothing fits 1.0 GB a GPU and 1,000.0 GB a host."
    assert "No lever is enough: use fewer frames, a smaller size or more GPUs." in lines[1]


def test_the_data_for_programs() -> None:
    there = room(80)
    data: dict[str, Any] = as_data(advise(run_of(), there), plan_cache(run_of(), 1), there)
    one = next(c for c in data["configs"] if c["name"] == "zero2")
    parts = {"weights", "gradients", "optimizer", "activations", "first_stage", "text_encoder", "buffers"}
    assert parts <= set(one["per_gpu"])
    assert one["gpu"] == sum(one["per_gpu"].values()) and one["host"] == sum(one["per_host"].values())
    assert one["fits"] is True and data["recommended"] in {c["name"] for c in data["configs"]}
