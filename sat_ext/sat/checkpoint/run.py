"""What has to be known of a run between SAT's calls: where it came from, and how far it is in the data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sat.helpers import print_rank0

from sat_ext.data.index import Group
from sat_ext.errors import ConfigError
from sat_ext.models.checkpoint import find_weights, no_checkpoint
from sat_ext.sat.checkpoint.layout import Base, CellState, Manifest, read_manifest, whole_checkpoints
from sat_ext.sat.settings import Settings, settings_of


@dataclass
class Run:
    """`resumed` and `folder` are of the full checkpoint that the run goes on from; `base` holds the weights that
    its own checkpoints leave out; `saved` is the iteration of its last checkpoint; `random` are this rank's random
    numbers in `folder`, until the first step; `bad_steps` is how many of the newest steps changed no weight.
    """

    settings: Settings
    resumed: Manifest | None = field(default=None, repr=False)
    folder: Path | None = None
    base: Base | None = None
    whole: bool = True
    saved: int | None = None
    engine: Any = field(default=None, repr=False)  # SAT prints all of `args`
    random: dict[str, Any] | None = field(default=None, repr=False)
    began: bool = False
    bad_steps: int = 0
    save_owed: bool = False


def run_of(args: argparse.Namespace) -> Run:
    """The run's state, kept in `args` as SAT keeps its own. Raises `ConfigError` for a bad `args.load`."""
    run: Run | None = getattr(args, "sat_ext_run", None)
    if run is None:
        run = args.sat_ext_run = Run(settings_of(args))
        _check(args, run.settings)
        if getattr(args, "load", None):
            _look_at(run, Path(args.load), going_on=args.mode == "pretrain")
    return run


def _check(args: argparse.Namespace, settings: Settings) -> None:
    if settings.checkpoint != "full":
        return
    if getattr(args, "model_parallel_size", 1) > 1:
        raise ConfigError(
            f"args.checkpoint: 'full' is for model_parallel_size 1, not {args.model_parallel_size}; use 'weights'."
        )
    zero = (getattr(args, "deepspeed_config", None) or {}).get("zero_optimization") or {}
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise ConfigError(
            "args.checkpoint: 'full' cannot save an optimizer that is offloaded to NVMe; use "
            "deepspeed.zero_optimization.offload_optimizer.device: cpu, or 'checkpoint: weights'."
        )


def _look_at(run: Run, path: Path, *, going_on: bool) -> None:
    if not (path / "latest").is_file():
        raise ConfigError(
            f"args.load: {no_checkpoint(path)}; name CogVideo's transformer folder, or a run's folder."
        )
    file = find_weights(path)
    manifest = read_manifest(file.parent)
    run.whole = False
    if going_on and manifest is not None:
        run.resumed, run.folder, run.base, run.whole = manifest, file.parent, manifest.base, manifest.whole
        run.saved = manifest.iteration if file.parent.name == str(manifest.iteration) else None
        if newer := [p.name for p in whole_checkpoints(path) if int(p.name) > manifest.iteration]:
            print_rank0(f"resume: {path / 'latest'} names {file.parent.name}, and {newer[-1]} is newer.")
    else:
        name = file.parent.name
        run.base = Base(path=str(path.resolve()), iteration=int(name) if name.isdecimal() else None)


def is_trained(parameter: torch.Tensor) -> bool:
    """Whether training changes a parameter: CogVideo freezes some by a learning rate of 0."""
    return parameter.requires_grad and getattr(parameter, "lr_scale", 1) != 0


def micro_steps(args: argparse.Namespace) -> int:
    """Batches that each rank took since the run began, those whose loss was not finite too."""
    counted: int | None = getattr(args, "sat_ext_micro_steps", None)
    return getattr(args, "iteration", 0) * args.gradient_accumulation_steps if counted is None else counted


def first_step(args: argparse.Namespace) -> int:
    """The step of the schedule that `samples_used` begins, from which the data have to go on."""
    resumed = run_of(args).resumed
    return micro_steps(args) - (resumed.micro_steps if resumed else 0)


def samples_used(
    args: argparse.Namespace, groups: Sequence[Group], shares: Mapping[str, float], seed: int
) -> list[int] | None:
    """Samples of each of the `groups` that the run trained on before it was resumed; None for one that begins.

    Groups are told apart by source and bucket. One that is new begins where it would be, had it been there from
    the start: it would else be alone until it had caught up.
    """
    resumed = run_of(args).resumed
    if resumed is None or not resumed.cells:
        return None
    if seed != resumed.seed:
        print_rank0(
            f"resume: data.params.seed was {resumed.seed} and is {seed}; the epoch goes on in another order."
        )
    cells = {(c.source, c.bucket): c for c in resumed.cells}
    names = [(g.source, str(g.bucket)) for g in groups]
    for cell in resumed.cells:
        if (cell.source, cell.bucket) not in names:
            print_rank0(f"resume: source '{cell.source}' has no samples of {cell.bucket} any more.")
    known = {g.source: 0 for g, n in zip(groups, names) if n in cells}
    records = dict.fromkeys(known, 0)
    for group, name in zip(groups, names):
        if name in cells:
            known[group.source] += cells[name].used
            records[group.source] += len(group.rows)
            if cells[name].records != len(group.rows):
                print_rank0(
                    f"resume: source '{group.source}' had {cells[name].records} samples of {group.bucket}, and "
                    f"has {len(group.rows)} now; the epoch goes on at the same place, in another order."
                )
    if not known:
        print_rank0("resume: none of the checkpoint's sources is in the data any more; they begin anew.")
        return [0] * len(groups)
    per_share = sum(known.values()) / sum(shares[s] for s in known)
    used = []
    for group, name in zip(groups, names):
        if name in cells:
            used.append(cells[name].used)
            continue
        of_source = sum(len(g.rows) for g in groups if g.source == group.source)
        epochs = (
            known[group.source] / records[group.source]
            if group.source in known
            else (per_share * shares[group.source] / of_source)
        )
        used.append(round(epochs * len(group.rows)))
        print_rank0(f"resume: source '{group.source}' has new samples, of {group.bucket}; they join from now on.")
    return used


def cells_of(args: argparse.Namespace) -> tuple[CellState, ...]:
    """The place in the data now; nothing for data that are not ours."""
    streams = getattr(args, "sat_ext_streams", {}).get("train_data")
    if not streams:
        return ()
    schedule = streams[0].schedule
    used = schedule.state(first_step(args))
    return tuple(
        CellState(source=c.source, bucket=str(c.bucket), records=c.records, used=int(n))
        for c, n in zip(schedule.cells, used, strict=True)
    )
