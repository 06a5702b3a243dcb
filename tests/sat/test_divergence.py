"""A run that has diverged ends in a sentence, on every rank, and leaves the good checkpoints as they are."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from sat_ext.errors import ConfigError, TrainingError
from sat_ext.sat import divergence
from sat_ext.sat.run import RunState, run_of
from sat_ext.sat.settings import NAMES, Settings
from tests.sat.ranks import Server, finish, folder_of
from tests.sat.repairs import repair
from tests.sat.runs import QUICK

Configure = Callable[..., list[str]]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(p.name) for p in run.iterdir() if p.name.isdecimal())


@pytest.mark.multiprocess
def test_a_run_that_diverges_ends_and_leaves_the_good_checkpoints(
    server: Server, configure: Configure, saved: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "save" / saved.name))
    options = {**QUICK, "train_iters": 40, "keep_last": 2, "stop_after_bad_steps": 5, "load": str(run)}
    arguments = configure(tmp_path, stage=2, **options)
    more = tmp_path / "rate.yaml"
    more.write_text("args: {lr_decay_style: constant}\ndeepspeed: {optimizer: {params: {lr: 1.0e+12}}}\n")
    diverged = server.start([*arguments, str(more)], world=2, folder=tmp_path / "on")
    finish(diverged, (1, 1))
    for rank in range(2):
        assert "error: training has diverged: in 5 steps in a row, up to iteration" in diverged.log(rank)
        assert f"resume from the last good checkpoint, 4 of {run} (args.load), with a lower" in diverged.log(rank)
        assert "Traceback" not in diverged.log(rank)
    assert "error: the checkpoint of iteration 6 was not saved: the loss or its gradients" in diverged.log()
    assert checkpoints(run) == [2, 4]


@pytest.mark.multiprocess
@pytest.mark.parametrize("checkpoint", ["full", "weights"])
def test_a_save_waits_for_a_step_that_changes_the_weights(
    server: Server, configure: Configure, tmp_path: Path, checkpoint: str
) -> None:
    """One rank's loss is not finite, at the step of a save and from then on at the last ones."""
    options = {**QUICK, "train_iters": 8, "save_interval": 2, "checkpoint": checkpoint}
    bad = [["rank1", step] for step in (3, 6, 7)]
    run = server.start(configure(tmp_path, **options), world=2, folder=tmp_path, nan_on=bad)
    finish(run, (1, 1))
    assert checkpoints(folder_of(tmp_path / "save")) == [2, 5, 6]
    assert "error: the checkpoint of iteration 8 was not saved" in run.log()
    assert "Traceback" not in run.log(0) + run.log(1)


@pytest.mark.multiprocess
def test_sigterm_after_a_bad_batch_waits_for_a_step_to_save(
    server: Server, configure: Configure, tmp_path: Path
) -> None:
    arguments = configure(tmp_path, **{**QUICK, "train_iters": 400, "save_interval": None})
    run = server.start(arguments, world=1, folder=tmp_path, slow=0.3, nan_on=[["rank0", n] for n in range(2, 12)])
    while run.alive() and len(run.records()) < 3:
        time.sleep(0.05)
    run.kill(signal.SIGTERM)
    finish(run, (143,))
    assert checkpoints(folder_of(tmp_path / "save")) == [len(run.records())]


@pytest.fixture
def one_rank(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)


def engine(stage: int, **config: Any) -> Any:
    repair("no_compiler", Namespace())
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    section = {
        "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-3}}, **config,
    }  # fmt: skip
    made, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=section, dist_init_required=False
    )
    return made


def update(model: Any, scale: float = 1.0) -> None:
    dtype = next(model.module.parameters()).dtype
    model.backward(model(torch.ones(1, 4, dtype=dtype)).float().mean() * scale)
    model.step()


@pytest.mark.parametrize("stage", range(4))
def test_weights_and_optimizer_states_are_looked_at_before_a_save(one_rank: None, stage: int) -> None:
    args, model = Namespace(iteration=2, save=None, load=None), engine(stage)
    update(model)
    divergence.check_finite(model, args)
    state = next(iter(model.basic_optimizer.state.values()))
    state["exp_avg_sq"].view(-1)[1] = float("inf")
    with pytest.raises(TrainingError, match=r"at iteration 2, the optimizer's exp_avg_sq of weight 0 of rank 0"):
        divergence.check_finite(model, args)
    state["exp_avg_sq"].view(-1)[1] = 0.0
    master = next(iter(model.basic_optimizer.state))
    master.data.view(-1)[0] = float("-inf")
    with pytest.raises(TrainingError, match=r"fp32 weight 0 of rank 0 is not finite, so no checkpoint was saved"):
        divergence.check_finite(model, args)
    master.data.view(-1)[0] = 0.0
    weight = next(model.module.parameters())
    getattr(weight, "ds_tensor", weight).data.view(-1)[0] = float("nan")
    with pytest.raises(TrainingError, match=r"0.weight of rank 0 .* start again with a lower learning rate"):
        divergence.check_finite(model, args)


def bad_steps(model: Any, steps: int, scale: float) -> int:
    run, args = RunState(settings=Settings()), Namespace(iteration=0, save=None, load=None)
    divergence.begin(model)
    for args.iteration in range(steps):
        before = divergence.attempts(model)
        update(model, scale)
        divergence.count(run, model, args, before)
    return run.bad_steps


def test_gradients_that_are_not_finite_count_though_the_loss_is(one_rank: None) -> None:
    """DeepSpeed skips the update in bf16, and SAT hears nothing of it."""
    assert bad_steps(engine(2), 3, 1.0) == 0
    with pytest.raises(TrainingError, match="in 20 steps in a row, up to iteration 20, the loss or its gradients"):
        bad_steps(engine(2), 30, float("inf"))


@pytest.mark.multiprocess
def test_fp16_finds_its_scale_and_ends_where_it_cannot(
    server: Server, configure: Configure, tmp_path: Path
) -> None:
    """Eight steps of halving from 2^34, of which none counts, train; a scale that may not go down ends the run."""
    if not get_accelerator().is_fp16_supported():
        pytest.skip("this CPU does not train in fp16")
    options = {**QUICK, "train_iters": 12, "save_interval": 12, "log_interval": 1, "stop_after_bad_steps": 3}
    fp16 = {"enabled": True, "initial_scale_power": 34, "hysteresis": 1}
    for name, lowest, statuses in (("finds", 1, (0,)), ("ends", 2**34, (1,))):
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps({"deepspeed": {"fp16": {**fp16, "min_loss_scale": lowest}}}))
        arguments = [*configure(tmp_path / name, stage=2, **options), str(file)]
        run = server.start(arguments, world=1, folder=tmp_path / name)
        finish(run, statuses)
        assert "Traceback" not in run.log()
    assert "error: training has diverged: in 3 steps in a row, up to iteration 3" in run.log()


def test_the_search_for_fp16s_loss_scale_is_no_divergence() -> None:
    """DeepSpeed's counters stand in for its engine: not every CPU trains in fp16."""
    scaler = SimpleNamespace(raise_error_at_min_scale=True)
    model = SimpleNamespace(
        global_steps=0, skipped_steps=0, zero_optimization_stage=lambda: 2, fp16_enabled=lambda: True,
        dynamic_loss_scale=lambda: True,
        optimizer=SimpleNamespace(loss_scaler=scaler, loss_scale=2.0**32),
        _config=SimpleNamespace(float16_config=SimpleNamespace(min_loss_scale=1)),
    )  # fmt: skip
    divergence.begin(model)
    assert not scaler.raise_error_at_min_scale
    run, args = RunState(settings=Settings()), Namespace(iteration=0, save=None, load=None)

    def skip() -> None:
        before = divergence.attempts(model)
        model.global_steps += 1
        model.skipped_steps += 1
        divergence.count(run, model, args, before)

    for _ in range(31):
        model.optimizer.loss_scale /= 2
        skip()
    assert run.bad_steps == 0
    model.optimizer.loss_scale = 1.0
    with pytest.raises(TrainingError, match="in 20 steps in a row"):
        for _ in range(20):
            skip()


def test_the_number_of_bad_steps_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"args.stop_after_bad_steps: 0; use 1 or more"):
        Settings(stop_after_bad_steps=0)


def test_deterministic_runs_ask_pytorch_and_cublas_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags alone: what they do on a GPU takes one."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    args = Namespace(load=None, mode="pretrain", **{**dict.fromkeys(NAMES), "deterministic": True})
    try:
        run_of(args)
        assert torch.are_deterministic_algorithms_enabled()
        assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], torch.backends.cudnn.benchmark) == (":4096:8", False)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
