"""Whether bytes are still what was written: CRC-32, which finds every flipped bit, at memory's speed.

PyTorch's files carry one for each of their records, and PyTorch does not look at them. Safetensors, JSON and Arrow
files get one from us (`latents/checksummed.py`, `checkpoint/layout.py`, `index/probe_cache.py`).
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import uint8 as byte

_CHUNK = 1 << 20  # bytes read at a time


def of_tensor(value: Tensor) -> int:
    """Of the bytes of a tensor on the CPU."""
    flat = value.contiguous().reshape(-1)
    return zlib.crc32(flat.view(byte).numpy().data) if flat.numel() else 0


def of_json(value: Any) -> str:
    """Of plain values, however they are spaced in their file."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def broken_record(file: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a file that `torch.save` wrote, or None.

    Of its records, only every `parts`-th is read, from `part` on. Files in torch's older formats have no
    checksums. Raises `OSError`.
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
