"""What has to be known of a run between SAT's calls: one object, `args.sat_ext`."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sat import mpu
from sat.helpers import print_rank0

from sat_ext.checkpoint.layout import find_weights, full_checkpoints, no_checkpoint
from sat_ext.checkpoint.manifest import Base, Manifest, read_manifest
from sat_ext.config import plain, read_yaml
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.recipe import TARGETS, Recipe, recipe_of
from sat_ext.sat.checkpoint.epoch import Epoch
from sat_ext.sat.section import TWICE, check_keys, check_section
from sat_ext.sat.settings import Settings, settings_of
from sat_ext.zero import zero_of


@dataclass(kw_only=True)
class RunState:
    """What one function of ours leaves for another: SAT passes nothing but `args` to them."""

    settings: Settings

    # where the run comes from
    resumed: Manifest | None = field(default=None, repr=False)  # SAT prints all of `args`
    folder: Path | None = None  # of the full checkpoint that is resumed
    base: Base | None = None  # the weights that its checkpoints leave out
    whole: bool = True  # they leave out none
    schedule: dict[str, Any] = field(default_factory=dict, repr=False)  # of the learning rate, as SAT saved it
    random: dict[str, Any] | None = field(default=None, repr=False)  # this rank's in `folder`, until it begins

    # how far it is
    began: bool = False
    micro_steps: int | None = None  # batches that each rank has taken
    steps: int = 0  # those in the data's present order, when it was resumed
    bad_steps: int = 0  # how many of the newest steps changed no weight
    saved: int | None = None  # iteration of the last checkpoint
    save_owed: bool = False  # a checkpoint was put off
    stopping: bool = False  # on SIGTERM

    # its data
    built: int = 0  # data sets that SAT has asked for
    streams: dict[str, list[Any]] = field(default_factory=dict, repr=False)  # by list
    shared_memory: int = 0  # bytes that their workers may fill
    epoch: Epoch | None = field(default=None, repr=False)  # samples that a checkpoint lists
    evaluated: str = "val"  # the list that is being evaluated, or `test`

    engine: Any = field(default=None, repr=False)
    recipe: Recipe | None = field(default=None, repr=False)
    memory: Any = field(default=None, repr=False)
    log: Any = field(default=None, repr=False)

    @property
    def cache_folder(self) -> str | None:
        """The folder of the latents that the run trains on; None where it reads media."""
        cache = None if self.recipe is None else self.recipe.data.cache
        return None if cache is None else cache.folder


def run_of(args: argparse.Namespace) -> RunState:
    """The run's state, kept in `args` as SAT keeps its own. Raises `ConfigError` for a bad `args.load`."""
    run: RunState | None = getattr(args, "sat_ext", None)
    if run is None:
        run = args.sat_ext = RunState(settings=settings_of(args))
        _check(args, run.settings)
        if run.settings.deterministic:  # https://docs.pytorch.org/docs/stable/notes/randomness.html
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS reads it at its first use
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False  # after SAT seeded, which turns it on
        if getattr(args, "load", None):
            _look_at(run, Path(args.load), resuming=args.mode == "pretrain")
    return run


def recipe_in(args: argparse.Namespace, data: Mapping[str, Any] | None = None) -> Recipe | None:
    """The run's recipe; None for data that are not ours. `data` is the section, else it is `args.data_config`.
    Raises `ConfigError`."""
    run = run_of(args)
    section = plain(data or getattr(args, "data_config", None))
    if run.recipe is None and section.get("target") in TARGETS:
        # CogVideo's script has its precision in `args`, and may have none in the deepspeed section
        precisions = {name: {"enabled": bool(getattr(args, name, False))} for name in ("fp16", "bf16")}
        deepspeed = precisions | plain(getattr(args, "deepspeed_config", None))
        model = getattr(args, "model_config", None)
        run.recipe = recipe_of({"data": section, "model": model, "deepspeed": deepspeed, "args": vars(args)})
    return run.recipe


def _check(args: argparse.Namespace, settings: Settings) -> None:
    engine = engine_of(getattr(args, "model_config", None))
    if engine.is_cogvideo and getattr(args, "deepspeed_config", None):
        _check_section(args)
    stage = int(zero_of(args).get("stage", 0))
    if settings.gradient_norms and (engine.is_cogvideo or stage == 3):
        why = "CogVideo's engine has none" if engine.is_cogvideo else "ZeRO-3 has split the weights by then"
        raise ConfigError(f"args.gradient_norms: true, but {why}; leave it out.")
    optimizer = ((getattr(args, "deepspeed_config", None) or {}).get("optimizer") or {}).get("type")
    if settings.evaluate_ema and not str(optimizer).endswith(".EmaAdamW"):
        raise ConfigError(
            f"args.evaluate_ema: true, but deepspeed.optimizer.type '{optimizer}' averages no weights; write "
            "'type: sat_ext.EmaAdamW', or leave it out."
        )
    if settings.checkpoint != "full":
        return
    if getattr(args, "model_parallel_size", 1) > 1:
        raise ConfigError(
            f"args.checkpoint: 'full' is for model_parallel_size 1, not {args.model_parallel_size}; use 'weights'."
        )
    if (zero_of(args).get("offload_optimizer") or {}).get("device") == "nvme":
        raise ConfigError(
            "args.checkpoint: 'full' cannot save an optimizer that is offloaded to NVMe; use "
            "deepspeed.zero_optimization.offload_optimizer.device: cpu, or 'checkpoint: weights'."
        )


def _check_section(args: argparse.Namespace) -> None:
    """As `arguments.parse_args` does, for CogVideo's script, which has parsed them before it calls us."""
    config = args.deepspeed_config
    check_keys(config, (read_yaml(args.base).get("args") or {}) if getattr(args, "base", None) else {})
    args.gradient_accumulation_steps = args.gradient_accumulation_steps or 1  # SAT multiplies by it
    counts = {k: getattr(args, name) for name, (k, *rest) in TWICE.items() if not rest}
    check_section({**counts, **config}, mpu.get_data_parallel_world_size(), checkpoints_activations=True)


def _look_at(run: RunState, path: Path, *, resuming: bool) -> None:
    if not (path / "latest").is_file():
        raise ConfigError(
            f"args.load: {no_checkpoint(path)}; name CogVideo's transformer folder, or a run's folder."
        )
    file = find_weights(path)
    manifest = read_manifest(file.parent)
    run.whole = False
    if resuming and manifest is not None:
        run.resumed, run.folder, run.base, run.whole = manifest, file.parent, manifest.base, manifest.whole
        run.saved = manifest.iteration if file.parent.name == str(manifest.iteration) else None
        if newer := [p.name for p in full_checkpoints(path) if int(p.name) > manifest.iteration]:
            print_rank0(f"resume: {path / 'latest'} names {file.parent.name}, but {newer[-1]} is newer.")
    else:
        name = file.parent.name
        run.base = Base(path=str(path.resolve()), iteration=int(name) if name.isdecimal() else None)


def micro_steps(args: argparse.Namespace) -> int:
    """Batches that each rank has taken since the run began, those whose loss was not finite included."""
    counted = run_of(args).micro_steps
    return getattr(args, "iteration", 0) * args.gradient_accumulation_steps if counted is None else counted
