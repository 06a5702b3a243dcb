"""The lengths that clips train at, against the real `SFTDataset` of a CogVideo checkout."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Checkout

from sat_ext.config import load
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from tests.media import write_clip

decord = pytest.importorskip("decord")


def original(sat: Path) -> Any:
    """The class alone: its module imports parts of torchvision that newer versions lack."""
    tree = ast.parse((sat / "data_video.py").read_text(encoding="utf-8"))
    wanted = {"SFTDataset", "pad_last_frame"}
    tree.body = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name in wanted]
    names: dict[str, Any] = {"resize_for_rectangle_crop": lambda frames, size, reshape_mode: frames}
    names |= {
        "decord": decord,
        "VideoReader": decord.VideoReader,
        "Dataset": object,
        "np": np,
        "torch": torch,
        "os": os,
    }
    exec(compile(tree, "data_video.py", "exec"), names)
    return names["SFTDataset"]


@pytest.mark.parametrize(("frames", "rate"), [(144, 24), (150, 25), (180, 30), (181, 30), (300, 50)])
def test_a_clip_of_six_seconds_trains_at_49_frames_as_in_cogvideo(
    checkout: Checkout, tmp_path: Path, frames: int, rate: int
) -> None:
    write_clip(tmp_path / "clip.mp4", frames, rate, size=(64, 64)).with_suffix(".txt").write_text("a clip")
    params: dict[str, Any] = {"video_size": [64, 64], "fps": 8, "max_num_frames": 49, "skip_frms_num": 3.0}
    try:
        theirs = original(checkout.sat)(data_dir=str(tmp_path), **params)[0]
    finally:
        decord.bridge.set_bridge("native")  # the class has it give tensors, to the whole process
    assert theirs["num_frames"] == 49
    index = build_index([SourceConfig(path=str(tmp_path))], load(DataConfig, params, "data.params"))
    assert [g.bucket.frames for g in index.groups] == [49]
