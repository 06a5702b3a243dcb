"""What lies where in a full checkpoint, and what `sat_ext.json` says of it.

<run>/latest                                   replaced last: names the newest whole checkpoint
<run>/<iteration>/sat_ext.json                 the `Manifest`
<run>/<iteration>/mp_rank_00_model_states.pt   weights, as SAT reads them
<run>/<iteration>/*_optim_states.pt            DeepSpeed's, of each rank; `optimizer.pt` without ZeRO
<run>/<iteration>/zero_pp_rank_*_model_states.pt   DeepSpeed's under ZeRO-3: the order of the shards
<run>/<iteration>/rng_<rank>.pt                random number generators of each rank
<run>/<iteration>/data.pt                      hashes of the epoch's samples (`epoch.py`)
<run>/<iteration>.partial/                     one being written, or what a killed run left of one
<run>/<iteration>.old.partial/                 one that another of its iteration is about to replace
<run>/.lock                                    held by the run that saves here
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from sat_ext.config import load
from sat_ext.errors import ConfigError
from sat_ext.models.checkpoint import CHECKSUM, MANIFEST_NAME, checksum_of, read_json

OPTIMIZER_NAME = "optimizer.pt"
PARTIAL = ".partial"


@dataclass(frozen=True, kw_only=True)
class CellState:
    """How many samples of a cell were trained on; `records` is how many it had, `keys` a hash of these
    (`epoch.py`), which checkpoints of earlier versions lack."""

    source: str
    bucket: str
    records: int
    used: int
    keys: str | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """The weights below those that are trained: a run's folder; `iteration` is None for the folder `release`."""

    path: str
    iteration: int | None


@dataclass(frozen=True, kw_only=True)
class RateState:
    """Where SAT's `AnnealingLR` is, in optimizer steps; its first steps are warmed up in a way of their own."""

    num_iters: int
    init_step: int
    auto_warmup_steps: int
    auto_warmup_rate: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`sat_ext.json`. `micro_steps` counts batches that a rank took from the data since the run began; `whole`
    tells that frozen weights are in it too; `files` are sizes in bytes, by which a truncated file is found before
    any is read; `shares` are by source, as parts of 1. In the file a `checksum` of all of it follows.
    """

    sat_ext: str
    iteration: int
    micro_steps: int
    world: int
    zero_stage: int
    round_robin: bool
    seed: int
    global_steps: int
    global_samples: int
    skipped_steps: int
    whole: bool
    base: Base | None
    rate: RateState
    cells: tuple[CellState, ...]
    files: dict[str, int]
    shares: dict[str, float] = dataclasses.field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync `sat_ext.json`."""
    content = dataclasses.asdict(manifest)
    with open(folder / MANIFEST_NAME, "w") as file:
        json.dump({**content, CHECKSUM: checksum_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a full checkpoint, None for one of weights alone. Raises `ConfigError` for missing files."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    manifest = _read(folder)
    if isinstance(manifest, str):
        raise ConfigError(f"{manifest}; {_remedy(folder)}.")
    return manifest


def _read(folder: Path) -> Manifest | str:
    """The manifest, or what is wrong with a file. Raises `ConfigError` for a manifest of another version."""
    file = folder / MANIFEST_NAME
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        return f"{file}: truncated or changed ({error})"
    manifest = load(Manifest, content, str(file))
    for name, size in manifest.files.items():
        found = size_of(folder / name)
        if found is None:
            return f"{folder}: {name} is missing, so the checkpoint is not whole"
        if found != size:
            return f"{folder / name}: truncated or changed, {found} bytes where {size} were written"
    return manifest


def size_of(file: Path) -> int | None:
    """In bytes; None for a file that is not there."""
    try:
        return file.stat().st_size
    except OSError:
        return None


def is_sound(folder: Path) -> bool:
    """Whether every file of a full checkpoint is there, in the size in which it was written."""
    try:
        return isinstance(_read(folder), Manifest)
    except ConfigError:
        return False


def _remedy(folder: Path) -> str:
    run = folder.parent
    if others := [p for p in whole_checkpoints(run) if p != folder and is_sound(p)]:
        return f"write {others[-1].name} into {run / 'latest'}"
    for path in (run / f"{folder.name}{PARTIAL}", aside_of(folder)):
        if is_sound(path):  # a save was killed just before, or between, its renames
            return f"remove {folder.name}, and rename {path.name} to {folder.name}"
    return "start from another checkpoint"


def whole_checkpoints(run: Path) -> list[Path]:
    """The folders of full checkpoints of a run, by iteration; see `is_sound`."""
    found = [p.parent for p in run.glob(f"*/{MANIFEST_NAME}") if p.parent.name.isdecimal()]
    return sorted(found, key=lambda p: int(p.name))


def aside_of(folder: Path) -> Path:
    """Where a checkpoint lies while another of its iteration takes its place."""
    return folder.with_name(f"{folder.name}.old{PARTIAL}")
