"""Resumes a run: its weights before DeepSpeed starts, then optimizer, learning rate and random numbers."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from sat.helpers import print_rank0
from torch import Tensor, nn

from sat_ext.checkpoint.layout import find_weights
from sat_ext.checkpoint.manifest import read_manifest
from sat_ext.checkpoint.reading import read_file, read_weights, require_sound, under_adapters, weight_files
from sat_ext.ranks import on_every_rank, rank_and_world
from sat_ext.sat.checkpoint import rng
from sat_ext.sat.checkpoint.matching import check_fit, check_trained, check_whole
from sat_ext.sat.checkpoint.optimizer_state import load_optimizer
from sat_ext.sat.checkpoint.partitions import gathered_loading
from sat_ext.sat.run import RunState, run_of


def load_full(load: Callable[..., int], model: Any, args: argparse.Namespace, *rest: Any, **options: Any) -> int:
    """Around SAT's `load_checkpoint`: load full checkpoints ourselves, and leave any other to SAT."""
    if rest or options or read_manifest(find_weights(Path(args.load)).parent) is None:
        return load(model, args, *rest, **options)
    return _load_weights(model, args)


def set_up_resumable(
    set_up: Callable[..., Any], args: argparse.Namespace, model: Any, *rest: Any, **options: Any
) -> Any:
    """Check what trains against the checkpoint before an optimizer is made. Keep the engine for later."""
    run = run_of(args)
    if run.base is not None or run.resumed is not None:
        if hasattr(model, "disable_untrainable_params"):
            model.disable_untrainable_params()  # SAT would next: it says which weights train
        check_trained(model, run)
    run.engine, optimizer = set_up(args, model, *rest, **options)
    return run.engine, optimizer


def with_saved_state(
    make_scheduler: Callable[..., Any], optimizer: Any, iteration: int, args: argparse.Namespace, **options: Any
) -> Any:
    """Restore the optimizer and the learning rate."""
    scheduler, run = make_scheduler(optimizer, iteration, args, **options), run_of(args)
    if run.resumed is not None:  # only now: SAT takes the rates that it finds in the optimizer for scales
        load_optimizer(run, scheduler)
    return scheduler


def _load_weights(model: nn.Module, args: argparse.Namespace) -> int:
    """Fill the model from the full checkpoint in `args.load`, and its base; the iteration to continue from. Raises
    `ConfigError` if the checkpoint is damaged or of another model."""
    run, path = run_of(args), Path(args.load)
    file = find_weights(path)
    names = {name for name, _ in model.named_parameters()}

    def read() -> tuple[dict[str, Tensor], int]:
        weights, iteration = read_weights(path)
        weights = under_adapters(weights, names)
        check_fit(model, weights, under_adapters(read_file(file)["module"], names), file)
        check_whole(model, weights, args, file)
        return weights, iteration

    on_every_rank(lambda: _require_sound(run, path))
    weights, iteration = on_every_rank(read)  # all ranks must come to the gathering, or none
    with gathered_loading(model):
        model.load_state_dict(weights, strict=False)
    print_rank0(f"loaded the weights of {file.parent}")
    if run.resumed is None:
        return 0
    run.micro_steps = run.resumed.micro_steps
    return iteration


def _require_sound(run: RunState, path: Path) -> None:
    # each rank checks a part of every file, whichever of them it needs: the time is that of one rank's share
    files = list(weight_files(path))
    if run.resumed is not None:
        files += [file for name in run.resumed.files if (file := files[0].with_name(name)) != files[0]]
    for file in files:
        with suppress(OSError):  # `read_file` says why
            require_sound(file, *rank_and_world())


def restore_rng(run: RunState, args: argparse.Namespace) -> None:
    """Restore this rank's random numbers; on another number of ranks, seed others."""
    saved = run.resumed
    assert saved is not None
    if saved.world == dist.get_world_size():
        assert run.random is not None
        rng.restore(run.random)
        run.random = None  # and with it the mapped file
        return
    ranks = f"{dist.get_world_size()} ranks continue a run of {saved.world}"
    print_rank0(f"resume: {ranks}: the same data, other random numbers")
    rng.seed(abs(int(args.seed)), saved.micro_steps, dist.get_rank())
