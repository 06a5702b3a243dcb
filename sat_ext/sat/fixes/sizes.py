"""DeepSpeed's buckets in the model's size."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from sat_ext.models.shape import sequence_shape
from sat_ext.zero import AUTO, fill_in_auto


def auto_sizes(args: argparse.Namespace) -> bool:
    """Symptom: DeepSpeed takes no "auto", which the files of configs/zero/ and Hugging Face's trainers have for
    sizes that follow from the model; its own defaults take gigabytes; and it dies where a YAML adds
    `offload_optimizer` to CogVideo's `cpu_offload: false` ("Cannot provide deprecated parameter").

    Raises `ConfigError` for one that nothing follows from.
    """
    config = getattr(args, "deepspeed_config", None)
    zero = (config or {}).get("zero_optimization") or {}
    if not config or not (_has_auto(config) or {"cpu_offload", "offload_optimizer"} <= zero.keys()):
        return False
    model: Any = OmegaConf.to_container(OmegaConf.create(args.model_config), resolve=True)
    args.deepspeed_config = fill_in_auto(config, sequence_shape(model).hidden_size)
    return True


def _has_auto(section: Mapping[str, Any]) -> bool:
    return any(_has_auto(v) if isinstance(v, Mapping) else v == AUTO for v in section.values())
