"""Where a run is in its data: saved with a checkpoint, and restored from one."""

import argparse
from collections import Counter

from sat.helpers import print_rank0

from sat_ext.checkpoint.layout import DATA_NAME
from sat_ext.checkpoint.manifest import CellState
from sat_ext.checkpoint.reading import read_file
from sat_ext.data.index import Index
from sat_ext.data.schedule import Cell, Schedule
from sat_ext.data.stream import JointStream
from sat_ext.ranks import rank_and_world
from sat_ext.sat.checkpoint.epoch import Epoch, changes, epoch_of
from sat_ext.sat.run import RunState, micro_steps, run_of


def first_step(args: argparse.Namespace) -> int:
    """The step of the stream's schedule at which the data continue."""
    run = run_of(args)
    return run.steps + micro_steps(args) - (run.resumed.micro_steps if run.resumed else 0)


def continue_order(run: RunState, stream: JointStream) -> None:
    """Let the stream of a resumed run begin where the checkpoint's order of steps began, to continue in the middle
    of a window of packs. With other ranks, sizes of steps, shares or data a new order begins."""
    resumed = run.resumed
    if resumed is None or not resumed.cells:
        return
    starts = {(c.source, c.bucket): c.start for c in resumed.cells}
    found = [starts.get((c.source, str(c.bucket))) for c in stream.schedule.cells]
    start = [used for used in found if used is not None]
    if len(start) == len(found):
        begun = stream.schedule.begun_at(start)
        if begun.state(resumed.steps) == stream.schedule.state(0):
            stream.schedule, run.steps = begun, resumed.steps
            stream.origin = run.steps % stream.accumulation  # which may have changed
            return
    print_rank0(
        "resume: the steps come in a new order, each sample of the epoch still once: ranks, batches, shares or "
        "data are not the checkpoint's, or it is of a version with another order."
    )


def samples_used(args: argparse.Namespace, index: Index, seed: int) -> list[int] | None:
    """Samples of each group of `index` that the run was trained on before it was resumed; None for a new run.
    Prints what has changed since the checkpoint. Raises `ConfigError` if its `data.pt` is damaged."""
    run = run_of(args)
    resumed = run.resumed
    if resumed is None or not resumed.cells:
        return None
    if seed != resumed.seed:
        print_rank0(f"resume: data.params.seed was {resumed.seed} and is {seed}; the epoch's order changes.")
    cells = {(c.source, c.bucket): c.used for c in resumed.cells}
    known, records, now = Counter[str](), Counter[str](), Counter[str]()
    for cell in resumed.cells:
        known[cell.source] += cell.used
        records[cell.source] += cell.records
    for group in index.groups:
        now[group.source] += len(group.rows)
    for source in records:
        if source not in now:
            print_rank0(f"resume: source '{source}' is not in the data any more.")
    kept = [source for source in now if records[source]]
    if not kept:
        print_rank0("resume: none of the checkpoint's sources is in the data any more; the new ones start.")
        return [0] * len(index.groups)
    # a new bucket starts where its source is; a new source where it would be had it been there from the beginning,
    # because from 0 it would be the only one to train on until it had caught up
    per_share = sum(known[s] for s in kept) / sum(index.shares[s] for s in kept)
    epochs = {s: known[s] / records[s] if s in kept else per_share * index.shares[s] / now[s] for s in now}
    used = [cells.get((g.source, str(g.bucket)), round(epochs[g.source] * len(g.rows))) for g in index.groups]
    for source in now:
        if source not in kept:
            print_rank0(f"resume: source '{source}' is new; it joins from now on.")
    _report_changes(run, index, used, seed)
    return used


def _report_changes(run: RunState, index: Index, used: list[int], seed: int) -> None:
    """Print which samples and shares are no longer what they were when the checkpoint was saved."""
    resumed, folder = run.resumed, run.folder
    assert resumed is not None and folder is not None
    if DATA_NAME in resumed.files:
        saved = read_file(folder / DATA_NAME)  # on every rank, so that all end if it is damaged
        if rank_and_world()[0] == 0:
            cells = [Cell(source=g.source, bucket=g.bucket, records=len(g.rows), tokens=1) for g in index.groups]
            schedule = Schedule(cells, index.shares, seed=seed, world=1)
            for sentence in changes(resumed.cells, saved, index, schedule, used):
                print_rank0(sentence)
    else:
        print_rank0(
            "resume: the checkpoint is of an earlier version, which does not list its samples: if the data have "
            "changed since then, some samples of this epoch come twice, and some not at all."
        )
    for source, share in resumed.shares.items():
        now = index.shares.get(source, 0) / sum(index.shares.values())
        if source in index.shares and abs(now - share) > 1e-9:
            print_rank0(f"resume: the share of source '{source}' was {share:.3g}, and is {now:.3g} from now on.")


def cells_of(args: argparse.Namespace) -> tuple[CellState, ...]:
    """The present place in the data, on the first rank; empty for a data set of the user's own class."""
    epoch, stream = data_of(args), stream_of(args)
    if epoch is None or stream is None:
        return ()
    schedule = stream.schedule
    used = schedule.state(first_step(args))
    return tuple(
        CellState(source=c.source, bucket=str(c.bucket), records=c.records, used=n, keys=keys, start=start)
        for c, n, keys, start in zip(schedule.cells, used, epoch.keys, schedule.used.tolist(), strict=True)
    )


def data_of(args: argparse.Namespace) -> Epoch | None:
    """The samples of the run's epoch, computed at the first save; None for a data set of the user's own class."""
    run, stream = run_of(args), stream_of(args)
    if run.epoch is None and stream is not None:
        run.epoch = epoch_of(stream.index, stream.schedule)
    return run.epoch


def stream_of(args: argparse.Namespace) -> JointStream | None:
    """What the run trains on, unless it is a data set of the user's own class."""
    streams = run_of(args).streams.get("train_data")
    return streams[0] if streams else None
