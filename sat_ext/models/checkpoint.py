"""A finished run's folder -> the engine with its weights. No code of a checkpoint is run."""

from __future__ import annotations

import codecs
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sat_ext.errors import ConfigError
from sat_ext.models.engine import VideoDiffusionEngine

CONFIG_NAME = "training_config.yaml"

# SAT keeps the state of NumPy's generator in its checkpoints; these are all the types that it is made of.
RNG_STATE_TYPES: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    codecs.encode,
    np.array([0]).__reduce__()[0],  # the function that rebuilds an array, wherever this NumPy keeps it
]


def find_run(path: Path) -> Path:
    """The run's folder: `path` itself, or the newest run in it. Raises `ConfigError` when there is none."""
    if (path / "latest").is_file():
        return path
    runs = sorted(path.glob("*/latest"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise ConfigError(
            f"{path}: no checkpoint here (a run's folder holds a file 'latest'); name a run's folder."
        )
    return runs[-1].parent


def read_run_config(run: Path) -> dict[str, Any]:
    """The configuration that the run was started with, as written beside its checkpoints."""
    file = run / CONFIG_NAME
    if not file.is_file():
        raise ConfigError(f"{run}: there is no {CONFIG_NAME}; it is written beside the checkpoints of a run.")
    config = yaml.safe_load(file.read_text())
    assert isinstance(config, dict)
    return config


def load_engine(run: Path) -> tuple[VideoDiffusionEngine, int]:
    """The engine of the newest checkpoint, in evaluation mode, and its iteration. Raises `ConfigError`."""
    config = read_run_config(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = bool(config.get("deepspeed", {}).get("bf16", {}).get("enabled"))
    dtype = torch.bfloat16 if bf16 and device == "cuda" else torch.float32
    engine = VideoDiffusionEngine(Namespace(model_config=config["model"]), params_dtype=dtype).to(device)
    tag = (run / "latest").read_text().strip()
    file = run / tag / "mp_rank_00_model_states.pt"
    try:
        with torch.serialization.safe_globals(RNG_STATE_TYPES):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{run}: 'latest' names {tag}, but there is no {file.name} in it; the save was cut short."
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{file}: not a checkpoint of ours, or a truncated one: {first}") from error
    missing, unexpected = engine.load_state_dict(state["module"], strict=False)
    if missing or unexpected:
        raise ConfigError(
            f"{file}: {len(missing)} weights of the model in {CONFIG_NAME} are missing and {len(unexpected)} "
            f"belong to another; first: {(missing or unexpected)[0]}."
        )
    return engine.eval(), int(state.get("iteration", 0))
