"""Which engine a model section names, and that one place asks."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from sat_ext.cogvideo.section import CogVideo
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.models.section import BuiltIn
from sat_ext.types import Bucket

ROOT = Path(__file__).parent.parent
FILES = [*(ROOT / "sat_ext").rglob("*.py"), ROOT / "train_video.py", *(ROOT / "benchmarks").glob("*.py")]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in FILES}
THEIRS: dict[str, Any] = {"network_config": {"params": {"hidden_size": 64}}}


def test_one_file_asks_which_engine_a_section_names() -> None:
    question = ('"network_config" in', '"network_config" not in', '.get("network_config")')
    asking = [name for name, text in SOURCES.items() if any(q in text for q in question)]
    assert sorted(asking) == ["sat_ext/cogvideo/network.py", "sat_ext/engines.py"]  # the former is its parser


def test_no_other_file_tells_engines_apart() -> None:
    """What differs is a member of `Engine`; comparing names or classes would ask every caller."""
    asking = {name for name, text in SOURCES.items() for node in ast.walk(ast.parse(text)) if tells_apart(node)}
    assert asking == {"sat_ext/engines.py"}


def tells_apart(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in ("BuiltIn", "CogVideo") for alias in node.names)
    if not isinstance(node, ast.Compare):
        return False
    sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
    return any("engine" in side and side.endswith(".name") for side in sides)


def test_the_section_names_its_engine() -> None:
    for section in (None, {}, {"pretrained": "x"}, OmegaConf.create({"pretrained": "x"})):
        assert isinstance(engine_of(section), BuiltIn)
    for section in (THEIRS, OmegaConf.create(THEIRS)):
        assert isinstance(engine_of(section), CogVideo)
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
