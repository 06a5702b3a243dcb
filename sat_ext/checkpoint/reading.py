"""A checkpoint's files -> its weights. No code in a checkpoint is run."""

import codecs
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_ext.checkpoint.integrity import require_sound
from sat_ext.checkpoint.layout import find_weights
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


def read_file(file: Path, *, types: tuple[Any, ...] = ()) -> Any:
    """What `torch.save` wrote to `file`, on the CPU; tensors are mapped if the format allows.

    Only tensors, plain values, the state of NumPy's generator and objects of `types` are accepted. Raises
    `ConfigError`, for a damaged record too (`require_sound`).
    """
    try:
        require_sound(file)
        with torch.serialization.safe_globals([*RNG_STATE_TYPES, *types]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except ConfigError:  # a `ValueError` too
        raise
    except FileNotFoundError:
        raise ConfigError(
            f"{file}: there is no such file, so the checkpoint is not whole; name another checkpoint."
        ) from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ConfigError(_not_ours(file)) from error
        raise ConfigError(
            f"{file}: not a checkpoint of ours: it holds code to be run ({code[1]}), and was not loaded; get one "
            "of weights alone."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror or error}); make it readable, or name another checkpoint."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(_not_ours(file)) from error


def _not_ours(file: Path) -> str:
    return f"{file}: not a checkpoint of ours, or a truncated one; name another checkpoint."


def under_adapters(weights: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """`weights` by the model's `names`: peft renames the weights of a layer under a LoRA to `base_layer`."""
    moved = {n.replace(".base_layer.", "."): n for n in names if ".base_layer." in n and n not in weights}
    return {moved.get(name, name): value for name, value in weights.items()}


def weight_files(run: Path, iteration: int | None = None) -> Iterator[Path]:
    """The files that `read_weights` reads. Raises `ConfigError`."""
    place: tuple[Path, int | None] | None = (run, iteration)
    while place is not None:
        yield (file := find_weights(*place))
        place = read_base(file.parent)


def read_weights(run: Path, iteration: int | None = None) -> tuple[dict[str, Tensor], int]:
    """All weights of a checkpoint by name, and its iteration. Those that it leaves out come from its base.

    Raises `ConfigError`.
    """
    file = find_weights(run, iteration)
    state = read_file(file)
    weights = state.get("module") if isinstance(state, dict) else None
    if not isinstance(weights, dict):
        raise ConfigError(f"{file}: holds no weights under 'module'; it is not a checkpoint of SAT or of ours.")
    base = read_base(file.parent)
    if base is not None:
        weights = {**read_weights(*base)[0], **weights}
    return weights, int(state.get("iteration", 0))
