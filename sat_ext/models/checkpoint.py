"""A run's folder -> its weights, and the engine with them. No code of a checkpoint is run.

<run>/latest                      the newest checkpoint's iteration
<run>/<iteration>/mp_rank_00_model_states.pt
<run>/<iteration>/sat_ext.json    of full checkpoints, which name the base weights that they leave out
"""

from __future__ import annotations

import codecs
import json
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from sat_ext import checksums
from sat_ext.errors import ConfigError

if TYPE_CHECKING:
    from sat_ext.models.engine import VideoDiffusionEngine

CONFIG_NAME = "training_config.yaml"
WEIGHTS_NAME = "mp_rank_00_model_states.pt"
MANIFEST_NAME = "sat_ext.json"
CHECKSUM = "checksum"  # the key in it

# SAT keeps the state of NumPy's generator in its checkpoints; these are all the types that it is made of.
RNG_STATE_TYPES: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    codecs.encode,
    np.array([0]).__reduce__()[0],  # the function that rebuilds an array, wherever this NumPy keeps it
    (np.array([0]).__reduce__()[0], "numpy.core.multiarray._reconstruct"),  # and where NumPy 1 kept it
]


_sound: set[tuple[str, int, int]] = set()  # files that this process found right: path, size, time of change


def find_run(path: Path) -> Path:
    """The run's folder: `path` itself, or the newest run in it. Raises `ConfigError` when there is none."""
    if (path / "latest").is_file():
        return path
    runs = sorted(path.glob("*/latest"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ConfigError(f"{no_checkpoint(path)}; name a run's folder.")
    return runs[-1].parent


def no_checkpoint(path: Path) -> str:
    """What is wrong with a folder that holds no checkpoints, without the remedy."""
    return f"{path}: no checkpoint here (a folder of checkpoints holds a file 'latest')"


def read_run_config(run: Path) -> dict[str, Any]:
    """The configuration that the run was started with, as written beside its checkpoints."""
    file = run / CONFIG_NAME
    if not file.is_file():
        raise ConfigError(f"{run}: there is no {CONFIG_NAME}; it is written beside the checkpoints of a run.")
    config = yaml.safe_load(file.read_text())
    assert isinstance(config, dict)
    return config


def find_weights(run: Path, iteration: int | None = None) -> Path:
    """The file of weights of `iteration`, or of the checkpoint that `latest` names. Raises `ConfigError`."""
    latest = run / "latest"
    if iteration is None and not latest.is_file():
        raise ConfigError(f"{no_checkpoint(run)}; name a run's folder.")
    tag = str(iteration) if iteration is not None else latest.read_text(errors="replace").strip()
    if iteration is None and not tag.isdecimal() and tag != "release":
        others = _others(run) or "the number of one that is there"
        raise ConfigError(f"{latest}: {tag[:40]!r} is not the number of a checkpoint; write {others} there.")
    file = run / tag / WEIGHTS_NAME
    if not file.is_file():
        source = "'latest' names" if iteration is None else "base weights:"
        aside = [run / f"{tag}{end}" for end in (".partial", ".old.partial")]  # a kill between two renames
        whole = [p.name for p in aside if (p / MANIFEST_NAME).is_file()]
        others = _others(run) or "the number of one that is there"
        remedy = f"rename {whole[0]} to {tag}" if whole else f"write {others} into 'latest'"
        raise ConfigError(
            f"{run}: {source} {tag}, but there is no {file.name} in it, so the save was cut short or the folder "
            f"moved; {remedy}."
        )
    return file


def _others(run: Path, but: str = "") -> str:
    names = {p.parent.name for p in run.glob(f"*/{WEIGHTS_NAME}") if p.parent.name.isdecimal()} - {but}
    return f"another ({', '.join(sorted(names, key=int)[-5:])})" if names else ""


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
        others = _others(run, but=file.parent.name) if (run / "latest").is_file() else ""
        remedy = f"write {others} into {run / 'latest'}" if others else "name another checkpoint, or copy it again"
        raise ConfigError(f"{file}: damaged: {reason}; {remedy}.")
    _sound.add(identity)


def read_file(file: Path, *, types: tuple[Any, ...] = ()) -> Any:
    """What `torch.save` wrote to `file`, on the CPU; tensors are mapped where the format allows.

    Only tensors and plain values are taken, the state of NumPy's generator, and objects of `types`. Raises
    `ConfigError`, also where a record is damaged (`require_sound`).
    """
    try:
        require_sound(file)
        with torch.serialization.safe_globals([*RNG_STATE_TYPES, *types]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except ConfigError:  # which is a `ValueError` too
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
            f"{file}: cannot be read ({error.strerror or error}); mend that, or name another checkpoint."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(_not_ours(file)) from error


def _not_ours(file: Path) -> str:
    return f"{file}: not a checkpoint of ours, or a truncated one; name another checkpoint."


def under_adapters(weights: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """`weights` by the model's `names`: a layer below a LoRA of peft keeps its own weights as `base_layer`."""
    moved = {n.replace(".base_layer.", "."): n for n in names if ".base_layer." in n and n not in weights}
    return {moved.get(name, name): value for name, value in weights.items()}


def weight_files(run: Path, iteration: int | None = None) -> Iterator[Path]:
    """The files that `read_weights` reads. Raises `ConfigError`."""
    place: tuple[Path, int | None] | None = (run, iteration)
    while place is not None:
        yield (file := find_weights(*place))
        place = read_base(file.parent)


def read_weights(run: Path, iteration: int | None = None) -> tuple[dict[str, Tensor], int]:
    """All weights of a checkpoint by name, and its iteration: what it left out comes from its base weights.

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


def load_engine(run: Path) -> tuple[VideoDiffusionEngine, int]:
    """The engine of the newest checkpoint, in evaluation mode, and its iteration. Raises `ConfigError`."""
    from sat_ext.models.engine import VideoDiffusionEngine  # and diffusers, which a SAT script does not need

    config = read_run_config(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = bool(config.get("deepspeed", {}).get("bf16", {}).get("enabled"))
    dtype = torch.bfloat16 if bf16 and device == "cuda" else torch.float32
    engine = VideoDiffusionEngine(Namespace(model_config=config["model"]), params_dtype=dtype).to(device)
    weights, iteration = read_weights(run)
    weights = under_adapters(weights, {name for name, _ in engine.named_parameters()})
    missing, unexpected = engine.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ConfigError(
            f"{find_weights(run)}: {len(missing)} weights of the model in {CONFIG_NAME} are missing and "
            f"{len(unexpected)} belong to another; first: {(missing or unexpected)[0]}."
        )
    return engine.eval(), iteration
