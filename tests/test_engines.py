"""Which engine a model section names, and that one place asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from sat_ext.engines import BUILT_IN, COGVIDEO, engine_of
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

ROOT = Path(__file__).parent.parent
THEIRS: dict[str, Any] = {"network_config": {"params": {"hidden_size": 64}}}


def test_one_file_asks_which_engine_a_section_names() -> None:
    question = ('"network_config" in', '"network_config" not in', '.get("network_config")')
    files = [*(ROOT / "sat_ext").rglob("*.py"), ROOT / "train_video.py", *(ROOT / "benchmarks").glob("*.py")]
    asking = [p.relative_to(ROOT).as_posix() for p in files if any(q in p.read_text("utf-8") for q in question)]
    assert sorted(asking) == ["sat_ext/cogvideo/network.py", "sat_ext/engines.py"]  # the former is its parser


def test_the_section_names_its_engine() -> None:
    for section in (None, {}, {"pretrained": "x"}, OmegaConf.create({"pretrained": "x"})):
        assert engine_of(section).name == BUILT_IN
    assert engine_of(THEIRS).name == engine_of(OmegaConf.create(THEIRS)).name == COGVIDEO
    with pytest.raises(ConfigError, match="model: expected a mapping of keys, got"):
        engine_of(["tiny"])


def test_of_a_model_that_is_not_given_nothing_is_known() -> None:
    engine = engine_of({})
    engine.check([Bucket(frames=5, height=48, width=48)])
    assert not engine.is_conditioned
    assert engine.batch_dtype(torch.bfloat16) == torch.bfloat16
    assert engine_of({"pretrained": "x"}).batch_dtype(torch.bfloat16) == torch.uint8
    with pytest.raises(ConfigError, match="no .model. section to take encoders from"):
        engine.fingerprints(torch.float32)
