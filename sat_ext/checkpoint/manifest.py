"""What `sat_ext.json` says of a full checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_ext import checksums
from sat_ext.checkpoint.layout import MANIFEST_NAME, PARTIAL, aside_of, whole_checkpoints
from sat_ext.config import load
from sat_ext.errors import ConfigError

CHECKSUM = "checksum"  # the key in it


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


def read_base(folder: Path) -> tuple[Path, int | None] | None:
    """Where a full checkpoint takes the weights from that it does not hold: a run's folder, and an iteration."""
    file = folder / MANIFEST_NAME
    if not file.is_file():
        return None
    try:
        base = read_json(file)["base"]
        return None if base is None else (Path(base["path"]), base["iteration"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: truncated or changed ({error}); take another checkpoint.") from error


def read_json(file: Path) -> dict[str, Any]:
    """The values of a manifest. Raises `ValueError` where they are not what was written.

    Those of earlier versions have no checksum. `base.path` is not in it: you may write where the base moved to.
    """
    content: dict[str, Any] = json.loads(file.read_text())
    if not isinstance(content, dict):
        raise ValueError("not a manifest")
    if content.pop(CHECKSUM, None) not in (None, checksum_of(content)):
        raise ValueError("its checksum does not match")
    return content


def checksum_of(manifest: dict[str, Any]) -> str:
    """Of a manifest's values, all but `base.path`."""
    base = manifest.get("base")
    return checksums.of_json({**manifest, "base": {**base, "path": ""} if base else base})
