"""Whether a file that `torch.save` wrote still holds what was written: it has a CRC-32 for each of its records,
which PyTorch itself does not check.
"""

import struct
import zipfile
import zlib
from pathlib import Path

from sat_ext.checkpoint.layout import other_checkpoints
from sat_ext.errors import ConfigError

_CHUNK = 1 << 20  # bytes read at a time

_sound: set[tuple[str, int, int]] = set()  # files that this process has checked: path, size, modification time


def require_sound(file: Path, part: int = 0, parts: int = 1) -> None:
    """Raise `ConfigError` if a record of `file` does not match its checksum, `OSError` if it cannot be read.

    A process checks a file once. Ranks may share the records: each of `parts` passes its own number as `part`.
    """
    status = file.stat()
    identity = (str(file.resolve()), status.st_size, status.st_mtime_ns)
    if identity in _sound:
        return
    if (reason := broken_record(file, part, parts)) is not None:
        run = file.parent.parent
        others = other_checkpoints(run, but=file.parent.name) if (run / "latest").is_file() else ""
        remedy = f"write {others} into {run / 'latest'}" if others else "name another checkpoint, or copy it again"
        raise ConfigError(f"{file}: damaged: {reason}; {remedy}.")
    _sound.add(identity)


def broken_record(file: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a file that `torch.save` wrote, or None; of its records, every `parts`-th is read.

    Files in the formats of PyTorch before 1.6 have no checksums. Raises `OSError`.
    """
    if not zipfile.is_zipfile(file):
        return None
    name = "its list of records"
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist()[part::parts]:
                name = f"'{record.filename}'"
                with archive.open(record) as content:
                    while content.read(_CHUNK):
                        pass
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, EOFError) as error:
        return f"{name} is not what was written ({error})"
    return None
