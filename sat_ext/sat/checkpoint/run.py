"""What has to be known of a run between SAT's calls: where it came from, and how far it is in the data."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sat import mpu
from sat.helpers import print_rank0

from sat_ext.config import read_yaml
from sat_ext.data.index import Index
from sat_ext.data.schedule import Cell, Schedule
from sat_ext.data.stream import JointStream
from sat_ext.errors import ConfigError
from sat_ext.models.checkpoint import find_weights, no_checkpoint, read_file
from sat_ext.ranks import rank_and_world
from sat_ext.sat.checkpoint.epoch import DATA_NAME, Epoch, changes, epoch_of
from sat_ext.sat.checkpoint.layout import Base, CellState, Manifest, read_manifest, whole_checkpoints
from sat_ext.sat.section import TWICE, check_keys, check_section
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
    epoch: Epoch | None = field(default=None, repr=False)
    began: bool = False
    bad_steps: int = 0
    save_owed: bool = False


def run_of(args: argparse.Namespace) -> Run:
    """The run's state, kept in `args` as SAT keeps its own. Raises `ConfigError` for a bad `args.load`."""
    run: Run | None = getattr(args, "sat_ext_run", None)
    if run is None:
        run = args.sat_ext_run = Run(settings_of(args))
        _check(args, run.settings)
        if run.settings.deterministic:
            _be_deterministic()
        if getattr(args, "load", None):
            _look_at(run, Path(args.load), going_on=args.mode == "pretrain")
    return run


def _check(args: argparse.Namespace, settings: Settings) -> None:
    is_cogvideos = "network_config" in (getattr(args, "model_config", None) or {})
    if is_cogvideos and getattr(args, "deepspeed_config", None):
        _check_section(args)
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


def _be_deterministic() -> None:
    """After SAT seeded, which turns cuDNN's benchmark on, and before cuBLAS reads its variable at its first use.

    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _check_section(args: argparse.Namespace) -> None:
    """CogVideo's script, whose arguments are not ours, has read it when we are called first."""
    config = args.deepspeed_config
    check_keys(config, (read_yaml(args.base).get("args") or {}) if getattr(args, "base", None) else {})
    args.gradient_accumulation_steps = args.gradient_accumulation_steps or 1  # SAT multiplies by it
    counts = {k: getattr(args, name) for name, (k, *rest) in TWICE.items() if not rest}
    check_section({**counts, **config}, mpu.get_data_parallel_world_size(), checkpoints_activations=True)


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
            print_rank0(f"resume: {path / 'latest'} names {file.parent.name}, but {newer[-1]} is newer.")
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


def samples_used(args: argparse.Namespace, index: Index, seed: int) -> list[int] | None:
    """Samples of each group of `index` that the run trained on before it was resumed; None for one that begins.

    Groups are told apart by source and bucket. A bucket that is new begins where its source is, and a source that
    is new where it would be, had it been there from the start: it would else be alone until it had caught up.
    What has changed since the checkpoint is printed. Raises `ConfigError` where its `data.pt` is damaged.
    """
    run = run_of(args)
    resumed = run.resumed
    if resumed is None or not resumed.cells:
        return None
    if seed != resumed.seed:
        print_rank0(
            f"resume: data.params.seed was {resumed.seed} and is {seed}; the epoch goes on in another order."
        )
    cells = {(c.source, c.bucket): c for c in resumed.cells}
    there = {g.source for g in index.groups}
    known, records = dict.fromkeys(there, 0), dict.fromkeys(there, 0)
    for cell in resumed.cells:
        if cell.source in there:
            known[cell.source] += cell.used
            records[cell.source] += cell.records
    for source in dict.fromkeys(c.source for c in resumed.cells if c.source not in there):
        print_rank0(f"resume: source '{source}' is not in the data any more.")
    if not any(records.values()):
        print_rank0("resume: none of the checkpoint's sources is in the data any more; the new ones start.")
        return [0] * len(index.groups)
    per_share = sum(known.values()) / sum(index.shares[s] for s in there if records[s])
    used = []
    for group in index.groups:
        cell_state = cells.get((group.source, str(group.bucket)))
        of_source = sum(len(g.rows) for g in index.groups if g.source == group.source)
        epochs = (
            known[group.source] / records[group.source]
            if records[group.source]
            else per_share * index.shares[group.source] / of_source
        )
        used.append(round(epochs * len(group.rows)) if cell_state is None else cell_state.used)
    for source in dict.fromkeys(g.source for g in index.groups if not records[g.source]):
        print_rank0(f"resume: source '{source}' is new; it joins from now on.")
    _report_changes(run, index, used, seed)
    return used


def _report_changes(run: Run, index: Index, used: list[int], seed: int) -> None:
    """Print what else is not as it was when the checkpoint was saved: samples, and shares."""
    resumed, folder = run.resumed, run.folder
    assert resumed is not None and folder is not None
    if DATA_NAME in resumed.files:
        saved = read_file(folder / DATA_NAME)  # on every rank, for all to end where it is damaged
        if rank_and_world()[0] == 0:
            cells = [Cell(source=g.source, bucket=g.bucket, records=len(g.rows), batch=1) for g in index.groups]
            schedule = Schedule(cells, index.shares, seed=seed, world=1)
            for sentence in changes(resumed.cells, saved, index, schedule, used):
                print_rank0(sentence)
    else:
        print_rank0(
            "resume: the checkpoint is of an earlier version, which does not list its samples: if the data have "
            "changed since then, some of this epoch come twice, and some not at all."
        )
    total = sum(index.shares.values())
    samples = {s: sum(n for n, g in zip(used, index.groups) if g.source == s) for s in index.shares}
    for source, share in resumed.shares.items():
        now = index.shares.get(source, 0) / total
        behind = round(now * sum(samples.values()) - samples.get(source, 0))
        if source in index.shares and abs(now - share) > 1e-9 and behind:
            print_rank0(
                f"resume: the share of source '{source}' was {share:.3g} and is {now:.3g}; shares count from the "
                f"beginning of the run, so it comes {'more' if behind > 0 else 'less'} often until "
                f"{abs(behind)} samples are made up for."
            )


def cells_of(args: argparse.Namespace) -> tuple[CellState, ...]:
    """The place in the data now; nothing for data that are not ours. On the first rank."""
    epoch, stream = data_of(args), stream_of(args)
    if epoch is None or stream is None:
        return ()
    schedule = stream.schedule
    used = schedule.state(first_step(args))
    return tuple(
        CellState(source=c.source, bucket=str(c.bucket), records=c.records, used=int(n), keys=keys)
        for c, n, keys in zip(schedule.cells, used, epoch.keys, strict=True)
    )


def data_of(args: argparse.Namespace) -> Epoch | None:
    """The samples of the run's epoch; None for data that are not ours. Made when it is first saved."""
    run, stream = run_of(args), stream_of(args)
    if run.epoch is None and stream is not None:
        run.epoch = epoch_of(stream.index, stream.schedule)
    return run.epoch


def stream_of(args: argparse.Namespace) -> JointStream | None:
    """What the run trains on, if it is ours."""
    streams = getattr(args, "sat_ext_streams", {}).get("train_data")
    return streams[0] if streams else None
