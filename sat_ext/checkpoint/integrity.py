"""Whether the records of a checkpoint's files are still what was written."""

from __future__ import annotations

from pathlib import Path

from sat_ext import checksums
from sat_ext.checkpoint.layout import other_checkpoints
from sat_ext.errors import ConfigError

_sound: set[tuple[str, int, int]] = set()  # files that this process found right: path, size, time of change


def require_sound(file: Path, part: int = 0, parts: int = 1) -> None:
    """Raise `ConfigError` where a record of `file` has not the checksum with which `torch.save` wrote it.

    The records are read once in a process. Of `parts` ranks that share them, each passes its own number as `part`.
    """
    status = file.stat()
    identity = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if identity in _sound:
        return
    if (reason := checksums.broken_record(file, part, parts)) is not None:
        run = file.parent.parent
        others = other_checkpoints(run, but=file.parent.name) if (run / "latest").is_file() else ""
        remedy = f"write {others} into {run / 'latest'}" if others else "name another checkpoint, or copy it again"
        raise ConfigError(f"{file}: damaged: {reason}; {remedy}.")
    _sound.add(identity)
