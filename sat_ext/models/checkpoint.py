"""A run's folder -> the built-in engine with its weights."""

from argparse import Namespace
from pathlib import Path

import torch

from sat_ext.checkpoint.layout import CONFIG_NAME, find_weights, read_run_config
from sat_ext.checkpoint.reading import read_weights, under_adapters
from sat_ext.errors import ConfigError
from sat_ext.models.engine import VideoDiffusionEngine


def load_engine(run: Path) -> tuple[VideoDiffusionEngine, int]:
    """The engine of the newest checkpoint, in evaluation mode, and its iteration. Raises `ConfigError`."""
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
