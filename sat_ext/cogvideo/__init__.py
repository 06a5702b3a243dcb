"""YAML targets for CogVideo's own engine. Nothing of CogVideo is imported before a target is called."""

from importlib import import_module
from typing import Any

_TARGETS = {
    "JointDiffusionLoss": "sat_ext.cogvideo.loss",
    "InterpolatedRotaryPositionEmbedding": "sat_ext.cogvideo.position",
    "SinusoidalPositionEmbedding": "sat_ext.cogvideo.position",
    "FinalLayer": "sat_ext.cogvideo.position",
    "PaddedSampler": "sat_ext.cogvideo.sampler",
    "StratifiedSampling": "sat_ext.cogvideo.timesteps",
    "CachedFirstStage": "sat_ext.cogvideo.cached",
    "ChunkedFirstStage": "sat_ext.cogvideo.chunked_first_stage",
    "OffloadedTextEmbedder": "sat_ext.cogvideo.text_embedders",
    "CachedTextEmbedder": "sat_ext.cogvideo.cached",
}
__all__ = list(_TARGETS)


def __getattr__(name: str) -> Any:
    """The target of this name, imported on first use."""
    if name in _TARGETS:
        return getattr(import_module(_TARGETS[name]), name)
    raise AttributeError(f"module 'sat_ext.cogvideo' has no attribute '{name}'; it has {', '.join(_TARGETS)}")
