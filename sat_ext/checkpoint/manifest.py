"""What `sat_ext.json` says of a full checkpoint."""

import dataclasses
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_ext.checkpoint.layout import MANIFEST_NAME, drafts_of, full_checkpoints
from sat_ext.config import load
from sat_ext.errors import ConfigError

CHECKSUM = "checksum"  # the key in it


@dataclass(frozen=True, kw_only=True)
class CellState:
    """How many samples of a cell were trained on (`used`) and how many it had (`records`); `start` is `used` at
    the beginning of the present order of steps, and `keys` a hash of the samples' keys (`epoch.py`). The first
    versions did not write the last two."""

    source: str
    bucket: str
    records: int
    used: int
    keys: str | None = None
    start: int | None = None


@dataclass(frozen=True, kw_only=True)
class Base:
    """The weights below those that are trained: a run's folder; `iteration` is None for the folder `release`."""

    path: str
    iteration: int | None


@dataclass(frozen=True, kw_only=True)
class RateState:
    """Where SAT's `AnnealingLR` is, in optimizer steps, with the warm-up that it adds after a resume."""

    num_iters: int
    init_step: int
    auto_warmup_steps: int
    auto_warmup_rate: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`micro_steps` counts the batches that each rank has taken since the run began; `whole`: frozen weights are
    saved too; `files` are sizes in bytes, which reveal a truncated file before any is read; `shares` add up to 1.
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
    steps: int = 0  # of the present order


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and sync `sat_ext.json`."""
    content = dataclasses.asdict(manifest)
    write_synced(folder / MANIFEST_NAME, json.dumps({**content, CHECKSUM: _checksum_of(content)}, indent=1))


def write_synced(file: Path, text: str) -> None:
    """Returns when `text` is on the disk, the file's name aside."""
    with open(file, "w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def read_manifest(folder: Path, *, sizes: bool = True) -> Manifest | None:
    """The manifest of a full checkpoint, None for one of weights alone. Raises `ConfigError` if it is damaged or,
    with `sizes`, if a file is missing or of another size."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    try:
        return _checked(folder, sizes=sizes)
    except ConfigError:  # is a `ValueError` too, with its own remedy
        raise
    except ValueError as error:
        raise ConfigError(f"{error}; {_remedy(folder)}.") from error


def read_base(folder: Path) -> tuple[Path, int | None] | None:
    """Where a full checkpoint's missing weights are: a run's folder, and an iteration. Raises `ConfigError`."""
    # its other files may be missing: somebody may have copied the weights alone, to sample or export
    manifest = read_manifest(folder, sizes=False)
    if manifest is None or manifest.base is None:
        return None
    return Path(manifest.base.path), manifest.base.iteration


def is_sound(folder: Path) -> bool:
    """Whether every file of a full checkpoint is there, in the size in which it was written."""
    try:
        _checked(folder)
    except ValueError:
        return False
    return True


def _checked(folder: Path, *, sizes: bool = True) -> Manifest:
    """Raises `ValueError` for damage, `ConfigError` for the manifest of another version."""
    file = folder / MANIFEST_NAME
    try:
        content = json.loads(file.read_text())
        # the first versions wrote no checksum
        if not isinstance(content, dict) or content.pop(CHECKSUM, None) not in (None, _checksum_of(content)):
            raise ValueError("its checksum does not match")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: truncated or changed ({error})") from error
    manifest = load(Manifest, content, str(file))
    for name, size in manifest.files.items() if sizes else ():
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing, so the checkpoint is not whole")
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{folder / name}: truncated or changed, {found} bytes where {size} were written")
    return manifest


def _checksum_of(manifest: dict[str, Any]) -> str:
    """Of its values, however they are spaced, without `base.path`, which a user may edit after moving the base."""
    base = manifest.get("base")
    values = {**manifest, "base": {**base, "path": ""} if base else base}
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _remedy(folder: Path) -> str:
    run = folder.parent
    if others := [p for p in full_checkpoints(run) if p != folder and is_sound(p)]:
        return f"write {others[-1].name} into {run / 'latest'}"
    for draft in drafts_of(folder):
        if is_sound(draft):  # a save was killed just before, or between, its renames
            return f"remove {folder.name}, and rename {draft.name} to {folder.name}"
    return "start from another checkpoint"
