"""What lies where in a run's folder: docs/checkpoints.md has the list."""

from pathlib import Path
from typing import Any

from sat_ext.config import read_yaml
from sat_ext.errors import ConfigError
from sat_ext.files.atomic import PARTIAL

CONFIG_NAME = "training_config.yaml"  # the merged YAML
WEIGHTS_NAME = "mp_rank_00_model_states.pt"
MANIFEST_NAME = "sat_ext.json"
OPTIMIZER_NAME = "optimizer.pt"
AVERAGE_NAME = "ema.pt"  # averaged weights, written by `sat/ema.py`
DATA_NAME = "data.pt"  # written by `sat/checkpoint/epoch.py`
LOCK_NAME = ".lock"


def find_run(path: Path) -> Path:
    """The run's folder: `path` itself, or the newest run in it. Raises `ConfigError` if there is none."""
    if (path / "latest").is_file():
        return path
    runs = sorted(path.glob("*/latest"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ConfigError(f"{no_checkpoint(path)}; name a run's folder.")
    return runs[-1].parent


def no_checkpoint(path: Path) -> str:
    """An error about a folder without checkpoints, for the caller to add the remedy."""
    return f"{path}: no checkpoint here (a folder of checkpoints holds a file 'latest')"


def read_run_config(run: Path) -> dict[str, Any]:
    """The configuration that the run was started with. Raises `ConfigError`."""
    file = run / CONFIG_NAME
    if not file.is_file():
        raise ConfigError(f"{run}: there is no {CONFIG_NAME}; it is written beside the checkpoints of a run.")
    return read_yaml([str(file)])


def find_weights(run: Path, iteration: int | None = None) -> Path:
    """The file of weights of `iteration`, or of the checkpoint that `latest` names. Raises `ConfigError`."""
    others = other_checkpoints(run) or "the number of one that is there"
    if iteration is not None:
        tag, source = str(iteration), "base weights:"
    else:
        latest, source = run / "latest", "'latest' names"
        if not latest.is_file():
            raise ConfigError(f"{no_checkpoint(run)}; name a run's folder.")
        tag = latest.read_text(errors="replace").strip()
        if not tag.isdecimal() and tag != "release":
            raise ConfigError(f"{latest}: {tag[:40]!r} is not the number of a checkpoint; write {others} there.")
    file = run / tag / WEIGHTS_NAME
    if not file.is_file():
        whole = [p.name for p in drafts_of(run / tag) if (p / MANIFEST_NAME).is_file()]
        remedy = f"rename {whole[0]} to {tag}" if whole else f"write {others} into 'latest'"
        raise ConfigError(
            f"{run}: {source} {tag}, but there is no {file.name} in it, so the save was cut short or the folder "
            f"moved; {remedy}."
        )
    return file


def other_checkpoints(run: Path, but: str = "") -> str:
    """For an error's remedy: the newest checkpoints of `run` without the one called `but`; "" for none."""
    names = {p.parent.name for p in run.glob(f"*/{WEIGHTS_NAME}") if p.parent.name.isdecimal()} - {but}
    return f"another ({', '.join(sorted(names, key=int)[-5:])})" if names else ""


def full_checkpoints(run: Path) -> list[Path]:
    """The folders of a run's full checkpoints, whole or not (`is_sound`), by iteration."""
    found = [p.parent for p in run.glob(f"*/{MANIFEST_NAME}") if p.parent.name.isdecimal()]
    return sorted(found, key=lambda p: int(p.name))


def drafts_of(folder: Path) -> tuple[Path, Path]:
    """Where a checkpoint lies before it gets its name, and while another of its iteration takes its place. After a
    kill between two renames there may be a whole one at either, and none at `folder`."""
    return folder.with_name(folder.name + PARTIAL), folder.with_name(f"{folder.name}.old{PARTIAL}")
