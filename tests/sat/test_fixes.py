"""Each repair of SAT: what goes wrong without it, and that it does not with it."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from threading import Event, Thread
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sat_ext.errors import ConfigError
from sat_ext.sat import hooks
from sat_ext.sat.fixes import memory, sizes
from sat_ext.sat.fixes.events import until_it_fails
from sat_ext.sat.fixes.memory import COLLECT_EVERY
from sat_ext.sat.run import RunState
from sat_ext.sat.settings import NAMES, Settings
from tests.sat.repairs import repair

MODULES = ("learning_rates", "model_io", "utils", "deepspeed_training")


@pytest.fixture
def sat_training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SAT's `deepspeed_training` as it is installed, whatever other tests have repaired; put back afterwards."""
    package = import_module("sat.training")
    for name in MODULES:
        import_module(f"sat.training.{name}")
        monkeypatch.delitem(sys.modules, f"sat.training.{name}")
        monkeypatch.delattr(package, name)
    monkeypatch.setattr(hooks, "_done", set())
    return import_module("sat.training.deepspeed_training")


def make_args(**changes: Any) -> Namespace:
    values = {**dict.fromkeys(NAMES), "checkpoint": "weights", "mode": "pretrain"}
    return Namespace(**{**values, **changes})


# Which are made


def test_every_repair_is_made_once_and_told_in_one_line(
    sat_training: Any, process_group: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sat"), "propagate", True)
    for _ in range(2):
        hooks.install(make_args(without_fixes=["no_compiler"]))
    lines = [r.getMessage() for r in caplog.records if "repaired '" in r.getMessage()]
    told = [line.split("'")[1] for line in lines]
    assert told == [  # what a CPU without ZeRO-3 needs
        "cpu_training", "resume", "load", "save", "evaluation", "lr_schedule", "timeout", "events",
    ]  # fmt: skip
    assert all("Without it: " in line and "\n" not in line for line in lines)


def test_a_repair_is_left_out_by_name(sat_training: Any, process_group: None) -> None:
    rate, show = sat_training.AnnealingLR.get_lr, sat_training.print_args
    hooks.install(make_args(without_fixes=["lr_schedule"]))
    assert sat_training.AnnealingLR.get_lr is rate
    assert sat_training.print_args is not show


def test_an_unknown_name_is_an_error_that_lists_them(sat_training: Any) -> None:
    with pytest.raises(
        ConfigError, match="args.without_fixes: unknown key 'lr_sched'; did you mean 'lr_schedule'"
    ):
        hooks.install(make_args(without_fixes=["lr_sched"]))
    with pytest.raises(ConfigError, match="valid keys: auto_sizes, cpu_training, empty_cache, "):
        hooks.install(make_args(without_fixes=["xyz"]))


# Learning rate


def rates(training: Any, steps: int, *, iteration: int = 0, saved: Any = None, **changes: Any) -> list[float]:
    """The learning rate of each step from `iteration` on, and the scheduler's state behind them."""
    values: dict[str, Any] = {
        "lr": 1.0, "lr_decay_iters": None, "train_iters": 200, "warmup": 0.05, "lr_decay_style": "linear",
        "lr_decay_ratio": 0.1, "mode": "pretrain",
        "sat_ext": RunState(settings=Settings(), schedule=saved or {}),
    }  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = training.get_learning_rate_scheduler(optimizer, iteration, Namespace(**{**values, **changes}))
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        scheduler.step()
    rates.state = scheduler.state_dict()  # type: ignore[attr-defined]
    return found


def test_a_resumed_run_has_the_rates_that_it_would_have_had(sat_training: Any) -> None:
    whole = rates(sat_training, 200)
    assert rates(sat_training, 100, iteration=100) != whole[100:]  # 100 steps of warming up again
    repair("lr_schedule", make_args())
    assert rates(sat_training, 200) == whole
    assert rates(sat_training, 100, iteration=100) == whole[100:]


def test_a_fine_tuning_run_stopped_in_its_first_steps_warms_up_to_their_end(sat_training: Any) -> None:
    repair("lr_schedule", make_args())
    whole = rates(sat_training, 200, mode="finetune")
    assert whole[50] == whole[99] == 0.05 < whole[100]
    rates(sat_training, 60, mode="finetune")
    state = rates.state  # type: ignore[attr-defined]
    assert rates(sat_training, 140, iteration=60, saved=state) == whole[60:]
    again = rates.state  # type: ignore[attr-defined]
    assert rates(sat_training, 20, iteration=180, saved=again) == whole[180:]


def test_no_rate_is_below_zero(sat_training: Any) -> None:
    assert min(rates(sat_training, 202, warmup=0.0)) < 0
    repair("lr_schedule", make_args())
    assert min(rates(sat_training, 202, warmup=0.0)) == 0


def test_no_warm_up_is_no_division_by_zero(sat_training: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        rates(sat_training, 2, warmup=0.0, mode="finetune")
    repair("lr_schedule", make_args())
    assert rates(sat_training, 2, warmup=0.0, mode="finetune") == [0.05, 0.05]


# Checkpoints


def checkpoint(folder: Path, module: dict[str, Any], **more: Any) -> Path:
    """A folder as SAT leaves one, NumPy's generator included."""
    (folder / "3").mkdir(parents=True)
    (folder / "latest").write_text("3")
    state = {"module": module, "iteration": 3, "np_rng_state": np.random.get_state(), **more}
    torch.save(state, folder / "3" / "mp_rank_00_model_states.pt")
    return folder


def load_into(training: Any, module: nn.Module, folder: Path, **changes: Any) -> int:
    args = make_args(load=str(folder), **{"no_load_rng": True, "force_train": False, **changes})
    iteration: int = training.load_checkpoint(module, args)
    return iteration


@pytest.fixture
def loading(sat_training: Any, process_group: None) -> Any:
    repair("cpu_training", make_args())
    repair("resume", make_args())
    repair("load", make_args())
    return sat_training


def test_a_checkpoint_with_numpys_generator_is_resumed(
    sat_training: Any, process_group: None, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, nn.Linear(2, 2).state_dict())
    torch.serialization.clear_safe_globals()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_into(sat_training, nn.Linear(2, 2), folder)
    repair("resume", make_args())
    assert load_into(sat_training, nn.Linear(2, 2), folder) == 3


def test_a_checkpoint_of_numpy_1_is_resumed(loading: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    file = folder / "3" / "mp_rank_00_model_states.pt"
    rewrite(file, lambda data: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    model = nn.Linear(2, 2)
    assert load_into(loading, model, folder) == 3
    assert model.weight.detach().eq(1).all()


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in parts.items():
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_a_checkpoint_is_mapped_and_not_read(
    loading: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: asked.append(how) or real(file, **how))
    load_into(loading, nn.Linear(2, 2), checkpoint(tmp_path, nn.Linear(2, 2).state_dict()))
    assert asked == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


def test_a_checkpoint_with_code_in_it_runs_nothing(loading: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"weight": torch.ones(2, 2)}, path=Path("x"))
    with pytest.raises(ConfigError, match="holds code to be run .*and was not loaded"):
        load_into(loading, nn.Linear(2, 2), folder)


@pytest.mark.parametrize("force", [False, True])
def test_a_checkpoint_of_another_model_is_named(loading: Any, tmp_path: Path, force: bool) -> None:
    larger = checkpoint(tmp_path / "larger", nn.Linear(3, 2).state_dict())
    with pytest.raises(ConfigError, match="is of another model than the YAML's .size mismatch for weight: .*2, 3"):
        load_into(loading, nn.Linear(2, 2), larger, force_train=force)
    other = checkpoint(tmp_path / "other", {"x": torch.ones(2)})
    with pytest.raises(ConfigError, match="has none of the 2 weights of the network .first: weight."):
        load_into(loading, nn.Linear(2, 2), other, force_train=force)


def test_a_checkpoint_that_lacks_weights_is_named(loading: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"weight": torch.ones(2, 2)})
    message = r"lacks weights of the YAML's model \(\['bias'\]\); name .* with 'force_train: true'"
    with pytest.raises(ConfigError, match=message):
        load_into(loading, nn.Linear(2, 2), folder)


def test_weights_that_stay_random_are_told(
    loading: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("sat"), "propagate", True)
    folder = checkpoint(tmp_path, {"weight": torch.ones(2, 2)})
    model = nn.Linear(2, 2)
    load_into(loading, model, folder, force_train=True)
    assert "1 of the network's 2 weights are not in" in caplog.text
    assert "(first: bias)" in caplog.text


def test_frozen_encoders_are_not_missed(loading: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": nn.Linear(2, 2), "conditioner": nn.Linear(2, 2).requires_grad_(False)})
    weights = {k: v for k, v in model.state_dict().items() if k.startswith("model.")}
    assert load_into(loading, model, checkpoint(tmp_path, weights)) == 3


# Memory in each step


STEP = """
import gc
import torch

def step():
    gc.collect()
    torch.cuda.empty_cache()
    return torch.ones(1)
"""


@pytest.fixture
def engine_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module as CogVideo's, which cleans up in every step."""
    module = ModuleType("diffusion_video")
    exec(STEP, vars(module))
    monkeypatch.setitem(sys.modules, "diffusion_video", module)
    return module


def test_the_cache_is_emptied_where_memory_runs_out_alone(
    engine_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, reserved, whole = {"gc": 0, "cache": 0}, 0, 100
    monkeypatch.setattr(gc, "collect", lambda *_: calls.__setitem__("gc", calls["gc"] + 1))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.__setitem__("cache", calls["cache"] + 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Namespace(total_memory=whole))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
    engine_module.step()
    assert calls == {"gc": 1, "cache": 1}
    assert repair("empty_cache", make_args())
    calls.update(gc=0, cache=0)
    for _ in range(COLLECT_EVERY):
        engine_module.step()
    assert calls == {"gc": 1, "cache": 0}
    reserved = 91
    assert engine_module.step().item() == 1
    assert calls == {"gc": 1, "cache": 1}


def test_other_engines_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffusion_video", raising=False)
    assert not repair("empty_cache", make_args())


# The allocator, and offload to a disk


@pytest.mark.parametrize("initialized", [False, True])
def test_the_allocators_segments_grow_unless_the_user_says_otherwise(
    initialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is here: that there is one is made up, and what PyTorch's allocator is asked is recorded."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append)
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(variable, "max_split_size_mb:128")
        assert not memory.expandable_segments(Namespace())
        monkeypatch.delenv(variable)
    for version, variable in (("2.4.1", "PYTORCH_CUDA_ALLOC_CONF"), ("2.13.0+cpu", "PYTORCH_ALLOC_CONF")):
        monkeypatch.setattr(torch, "__version__", version)
        assert memory.expandable_segments(Namespace())
        assert os.environ[variable] == "expandable_segments:True"
        monkeypatch.delenv(variable)
    assert asked == ["expandable_segments:True"] * 2 * initialized


def test_offload_to_nvme_that_cannot_work_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That there is a GPU without a toolkit is made up; whether libaio is here is DeepSpeed's own look."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    def section(path: str) -> Namespace:
        return Namespace(
            deepspeed_config={"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": path}}}
        )

    with pytest.raises(ConfigError, match=r"offload_param.nvme_path: /nowhere is not a writable folder"):
        sizes.auto_sizes(section("/nowhere"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(ConfigError, match=r"offload_param.device: nvme needs a CUDA toolkit .*zero3-offload.yaml"):
        sizes.auto_sizes(section(str(tmp_path)))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: False)
    with pytest.raises(
        ConfigError, match=r"nvme needs libaio with its headers \(apt install libaio-dev\), to compile"
    ):
        sizes.auto_sizes(section(str(tmp_path)))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: True)
    assert not sizes.auto_sizes(section(str(tmp_path)))


def test_a_flush_in_one_thread_does_not_lose_what_another_writes() -> None:
    writer, written, flushing, go_on = SimpleNamespace(), [], Event(), Event()

    def flush(_writer: Any) -> None:
        flushing.set()
        assert go_on.wait(60)

    thread = Thread(target=until_it_fails, args=(flush, writer))
    thread.start()
    assert flushing.wait(60)
    until_it_fails(lambda _writer, value: written.append(value), writer, 1)
    go_on.set()
    thread.join()

    def fails(_writer: Any) -> None:
        raise OSError("disk full")

    until_it_fails(fails, writer)
    until_it_fails(lambda _writer, value: written.append(value), writer, 2)
    assert written == [1]
