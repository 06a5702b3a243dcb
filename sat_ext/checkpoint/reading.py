"""A checkpoint's files -> its weights. Checksums are verified, and no code in a checkpoint is run."""

import codecs
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_ext.checkpoint.layout import AVERAGE_NAME, find_weights, other_checkpoints
from sat_ext.checkpoint.manifest import read_base
from sat_ext.errors import ConfigError

# All types in the state of NumPy's generator, which SAT saves in its checkpoints.
RNG_STATE_TYPES: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    codecs.encode,
    np.array([0]).__reduce__()[0],  # the function that rebuilds an array, wherever this NumPy has it
    (np.array([0]).__reduce__()[0], "numpy.core.multiarray._reconstruct"),  # and where NumPy 1 had it
]
_CHUNK = 1 << 20  # bytes read at a time

_sound: set[tuple[str, int, int]] = set()  # files that need no second check: path, size, modification time


def read_file(file: Path, *, types: tuple[Any, ...] = ()) -> Any:
    """What `torch.save` wrote to `file`, on the CPU, mapped if the format allows. Raises `ConfigError` unless it
    holds only tensors, plain values, the state of NumPy's generator and objects of `types`."""
    try:
        require_sound(file)
        with torch.serialization.safe_globals([*RNG_STATE_TYPES, *types]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except ConfigError:  # is a `ValueError` too
        raise
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: there is no such file, so the checkpoint is not whole; name another checkpoint."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror or error}); make it readable, or name another checkpoint."
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise ConfigError(
                f"{file}: not a checkpoint of ours: it holds code to be run ({code[1]}), and was not loaded; get "
                "one of weights alone."
            ) from error
        raise ConfigError(
            f"{file}: not a checkpoint of ours, or a truncated one; name another checkpoint."
        ) from error


def require_sound(file: Path, part: int = 0, parts: int = 1) -> None:
    """Raise `ConfigError` if a record of `file` does not match its checksum, `OSError` if it cannot be read.

    Ranks may share the records: each of `parts` passes its own number as `part`."""
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
    """What is wrong with a file that `torch.save` wrote, or None; every `parts`-th of its records is read.

    PyTorch stores a CRC-32 for each record (since 1.6), which it does not check itself. Raises `OSError`."""
    if not zipfile.is_zipfile(file):
        return None
    name = "its list of records"
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist()[part::parts]:
                name = f"'{record.filename}'"
                with archive.open(record) as content:
                    while content.read(_CHUNK):  # at the end of a record `zipfile` compares its checksum
                        pass
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, EOFError) as error:
        return f"{name} is not what was written ({error})"
    return None


def under_adapters(weights: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """`weights` by the model's `names`: peft renames the weights of a layer under a LoRA to `base_layer`."""
    moved = {n.replace(".base_layer.", "."): n for n in names if ".base_layer." in n and n not in weights}
    return {moved.get(name, name): value for name, value in weights.items()}


def weight_files(run: Path, iteration: int | None = None) -> Iterator[Path]:
    """The file of a checkpoint's weights, then that of its base, and so on. Raises `ConfigError`."""
    place: tuple[Path, int | None] | None = (run, iteration)
    while place is not None:
        yield (file := find_weights(*place))
        place = read_base(file.parent)


def read_average(weights: Path) -> dict[str, Tensor]:
    """What was trained, averaged, of the checkpoint with this file of weights. Raises `ConfigError`."""
    file = weights.with_name(AVERAGE_NAME)
    if not file.is_file():
        raise ConfigError(
            f"--ema: {weights.parent} holds no averaged weights ({AVERAGE_NAME}), which a run saves with "
            "'deepspeed.optimizer.type: sat_ext.EmaAdamW'; leave --ema out."
        )
    return dict(_state(file)["module"])


def read_weights(run: Path, iteration: int | None = None, *, ema: bool = False) -> tuple[dict[str, Tensor], int]:
    """All weights of a checkpoint by name, those that it leaves out from its base; and its iteration. With `ema`,
    what was trained is averaged. Raises `ConfigError`."""
    weights = read_average(find_weights(run, iteration)) if ema else {}
    iterations = []
    for file in weight_files(run, iteration):
        state = _state(file)
        weights = {**state["module"], **weights}
        iterations.append(int(state.get("iteration", 0)))
    return weights, iterations[0]


def _state(file: Path) -> dict[str, Any]:
    state = read_file(file)
    if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
        raise ConfigError(f"{file}: holds no weights under 'module'; it is not a checkpoint of SAT or of ours.")
    return state
