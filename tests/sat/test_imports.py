"""What must work beside CogVideo's requirements, where a library of our own engine often does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from tests.sat.test_dataset import PARAMS

# SAT imports `transformers.activations` at its own start, so the libraries go missing after that.
BLOCKED = """
import json, pkgutil, sys
from argparse import Namespace
from importlib import import_module

import sat
from sat import mpu

BLOCKED = ("diffusers", "transformers", "peft", "torchvision")

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"Failed to import {name}:\\noperator torchvision::nms does not exist")

for name in [n for n in sys.modules if n.partition(".")[0] in BLOCKED]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
"""
DATA = """
import torch
import torch.distributed as dist
import sat_ext, sat_ext.cogvideo
from sat_ext.sat.memory_report import report_of

args, params, store = json.loads(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(store, 1), rank=0, world_size=1)
mpu.initialize_model_parallel(1)
args = Namespace(**args)
report_of(args)
data = sat_ext.JointImageVideoDataset.create_dataset_function(args.train_data[0], args, **params)
print("batch", tuple(next(iter(data))["mp4"].shape[1:]))

class Parent(torch.nn.Module):
    def get_loss(self): ...

for name in sat_ext.cogvideo.__all__:
    getattr(sat_ext.cogvideo, name)
print("loss", sat_ext.cogvideo.JointDiffusionLoss(parent="__main__.Parent").condition_dropout)
for package in ("sat.checkpoint", "sat.fixes", "data", "latents", "preview", "memory"):
    for found in pkgutil.walk_packages(import_module("sat_ext." + package).__path__, f"sat_ext.{package}."):
        import_module(found.name)
"""
COMMANDS = """
from sat_ext.cli.main import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["sat-ext", *command]
    try:
        main()
    except SystemExit as end:
        print(command[0], "ended with", end.code)
"""


def run(code: str, argument: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, json.dumps(argument)], capture_output=True, text=True, timeout=280
    )


def test_data_class_and_loss_load_and_work_where_diffusers_does_not_import(
    sat_args: Callable[..., Namespace], tmp_path: Path
) -> None:
    network = {
        "num_frames": 49, "latent_height": 8, "latent_width": 8, "patch_size": 2, "in_channels": 16,
        "out_channels": 16, "num_layers": 30, "hidden_size": 1920, "num_attention_heads": 30,
        "modules": {
            "pos_embed_config": {"params": {"text_length": 226}},
            "patch_embed_config": {"params": {"text_hidden_size": 4096}},
        },
    }  # fmt: skip
    model = {"network_config": {"params": network}}
    data = {"target": "sat_ext.JointImageVideoDataset", "params": PARAMS}
    args = vars(sat_args(model_config=model, data_config=data, deepspeed_config={}))
    done = run(DATA, [args, PARAMS, str(tmp_path / "store")])
    assert done.returncode == 0, done.stderr
    assert "batch (" in done.stdout and "loss 0.0" in done.stdout
    (sentence,) = [line for line in done.stderr.splitlines() if "memory:" in line]
    assert sentence.startswith("memory: cannot be predicted for this run (ImportError: Failed to import diffusers")
    assert sentence.endswith("operator torchvision::nms does not exist)")


def test_check_and_preview_work_where_diffusers_does_not_import(demo: Path, tmp_path: Path) -> None:
    base, page = tmp_path / "run.yaml", tmp_path / "page.html"
    sources = [{"path": str(demo / "train")}]
    base.write_text(json.dumps({"data": {"params": {**PARAMS, "sources": sources}}}))
    commands = [["check", "--base", str(base)], ["preview", "--base", str(base), "-o", str(page)]]
    done = run(COMMANDS, commands)
    assert (done.returncode, done.stdout.count("ended with 0")) == (0, 2), done.stderr
    assert os.path.getsize(page) > 10_000
