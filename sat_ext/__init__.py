"""Train video diffusion models on images and videos together, on the SAT backend of CogVideoX."""

from typing import Any

__version__ = "0.1.0"
_TARGETS = {
    "JointImageVideoDataset": "sat_ext.sat.dataset",
    "FirstFrameDataset": "sat_ext.sat.dataset",
    "EmaAdamW": "sat_ext.sat.ema",
}
__all__ = list(_TARGETS)


def __getattr__(name: str) -> Any:
    """YAML targets, imported on first use: the data stages and the CLI do not need SAT."""
    if name in _TARGETS:
        from importlib import import_module

        return getattr(import_module(_TARGETS[name]), name)
    raise AttributeError(f"module 'sat_ext' has no attribute '{name}'")
