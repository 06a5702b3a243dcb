"""Repairs of SAT, each with its symptom. `apply()` makes them once per process and logs each in one line."""

from __future__ import annotations

import os
import signal
import threading
import time
import types
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from sat.helpers import print_rank0

from sat_ext.models.checkpoint import RNG_STATE_TYPES

_applied: set[str] = set()


def cpu_training() -> bool:
    """Symptom: without CUDA, SAT's timers and checkpoints die in `torch.cuda.synchronize` and `get_rng_state`.

    SAT's modules see a `torch` whose calls to the GPU do nothing; everybody else's `torch` is untouched.
    """
    if torch.cuda.is_available():
        return False
    from sat.training import deepspeed_training, model_io, utils

    stand_in = _TorchWithoutCuda()
    for module in (deepspeed_training, model_io, utils):
        module.torch = stand_in
    return True


def no_compiler() -> bool:
    """Symptom: on a CPU, DeepSpeed compiles an operator at its first start, and a start killed meanwhile leaves
    a lock for which every later one waits without end.

    The operator is an all-reduce through shared memory; gloo's own does the same work.
    """
    if torch.cuda.is_available():
        return False
    backend: Any = import_module("deepspeed.comm.torch")  # as an attribute, that name is torch itself
    backend.build_shm_op = lambda: None
    return True


def resume() -> bool:
    """Symptom: torch >= 2.6 refuses SAT's checkpoints ("Weights only load failed"): they hold a NumPy RNG state.

    Allows exactly the types that this state is made of; nothing else in a checkpoint can run code.
    """
    torch.serialization.add_safe_globals(RNG_STATE_TYPES)
    return True


def save() -> bool:
    """Symptom: under ZeRO-3, SAT saves the first rank's shard and drops the others; under ZeRO-0 in fp32, saving
    dies with "'AdamW' object has no attribute 'optimizer'".

    The weights of ZeRO-3 are gathered from all ranks and saved as one `mp_rank_00_model_states.pt`, as
    under the other stages.
    """
    from sat import mpu
    from sat.training import deepspeed_training, model_io

    original = model_io.save_checkpoint

    def save_checkpoint(iteration: int, model: Any, optimizer: Any, lr_scheduler: Any, args: Any) -> None:
        if not model.zero_optimization_partition_weights():
            # SAT looks for its own FusedEmaAdam inside of DeepSpeed's wrapper, and there is none in this case
            wrapped = optimizer if hasattr(optimizer, "optimizer") else None
            return original(iteration, model, wrapped, lr_scheduler, args)
        weights = model._zero3_consolidated_16bit_state_dict()  # a collective: every rank takes part
        if mpu.get_data_parallel_rank() == 0:
            is_fixed = getattr(model.module, "is_fixed", lambda name: False)  # what the YAML gives back
            weights = {name: weight for name, weight in weights.items() if not is_fixed(name)}
            name = model_io.get_checkpoint_name(args.save, iteration)
            os.makedirs(os.path.dirname(name), exist_ok=True)
            torch.save({"module": weights, "iteration": iteration}, name)
            with open(model_io.get_checkpoint_tracker_filename(args.save), "w") as tracker:
                tracker.write(str(iteration))
        torch.distributed.barrier()

    deepspeed_training.save_checkpoint = save_checkpoint
    return True


def zero3_build() -> bool:
    """Symptom: under ZeRO-3, SAT builds the model inside `deepspeed.zero.Init()` without a configuration, which
    rounds every weight to fp16 whatever the training dtype, and no `from_pretrained` works inside it.

    The model is built whole on every rank, and split up by `deepspeed.initialize`.
    """
    import deepspeed
    from sat.training import deepspeed_training

    original = deepspeed_training.get_model

    def get_model(args: Any, model_cls: type, **kwargs: Any) -> torch.nn.Module:
        init = deepspeed.zero.Init
        deepspeed.zero.Init = nullcontext
        try:
            return original(args, model_cls, **kwargs)
        finally:
            deepspeed.zero.Init = init

    deepspeed_training.get_model = get_model
    return True


def lr_schedule() -> bool:
    """Symptom: a resumed run warms up again for 100 steps, and divides by zero where `warmup` is 0; the last step
    of the linear decay has a learning rate below zero.

    A resumed run goes on with the rate that it would have had, and no rate is below zero.
    """
    from sat.training import deepspeed_training
    from sat.training.learning_rates import AnnealingLR

    make, get_lr = deepspeed_training.get_learning_rate_scheduler, AnnealingLR.get_lr

    def get_learning_rate_scheduler(optimizer: Any, iteration: int, args: Any, **kwargs: Any) -> Any:
        if iteration > 0:
            kwargs["auto_warmup_steps"] = 0
        return make(optimizer, iteration, args, **kwargs)

    def rate(self: Any) -> float:
        if self.warmup_iter == 0 and self.num_iters <= self.init_step + self.auto_warmup_steps:
            return float(self.start_lr * self.auto_warmup_rate)
        return max(0.0, get_lr(self))

    deepspeed_training.get_learning_rate_scheduler = get_learning_rate_scheduler
    AnnealingLR.get_lr = rate
    return True


def launcher() -> bool:
    """Symptom: SIGTERM or SIGKILL of the `deepspeed` command leaves the ranks of its machine training on.

    It starts a launcher process, which ends the ranks when it is ended, and does not tell it. The first rank looks
    every second whether the command is there, and else ends the launcher. A launcher that anything else started (a
    shell on another machine) is left alone.
    """
    process = os.getppid()
    command = _parent(process)
    if int(os.environ.get("LOCAL_RANK", 0)) or command is None:
        return False
    if "deepspeed.launcher.launch" not in _arguments(process) or not _DEEPSPEED & set(_arguments(command)):
        return False

    def watch() -> None:
        while _parent(process) == command:
            time.sleep(1)
        if os.getppid() == process:
            os.kill(process, signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return True


_DEEPSPEED = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner", "runner.py"}  # as it may be called


def _parent(pid: int) -> int | None:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def _arguments(pid: int) -> list[str]:
    """The command line of a process, folders left out."""
    with suppress(OSError):
        return [os.path.basename(a) for a in os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")]
    return []


FIXES: dict[str, Callable[[], bool]] = {
    "cpu_training": cpu_training,
    "no_compiler": no_compiler,
    "resume": resume,
    "save": save,
    "zero3_build": zero3_build,
    "lr_schedule": lr_schedule,
    "launcher": launcher,
}


def apply() -> None:
    """Apply every repair that this machine needs. Safe to call again."""
    for name, fix in FIXES.items():
        if name not in _applied and fix():
            assert fix.__doc__
            symptom = " ".join(fix.__doc__.split("\n\n")[0].split())
            print_rank0(f"repaired SAT ({name}). {symptom}")
        _applied.add(name)


class _TorchWithoutCuda(types.ModuleType):
    """`torch` as it is, but for `torch.cuda`: synchronising and the GPU's random state are nothing to do."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _NoCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _NoCuda(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def synchronize(self, *_: Any) -> None:
        """Nothing runs beside the CPU."""

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        """There is no GPU whose state could be kept."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        """There is no GPU whose state could be restored."""
