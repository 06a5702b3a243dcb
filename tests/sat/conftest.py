from __future__ import annotations

import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from sat import mpu

from sat_ext.demo_data import write_demo
from tests.sat.ranks import Server, finish, folder_of
from tests.sat.runs import QUICK, write_config


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One gloo rank, with SAT's own groups."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mpu.initialize_model_parallel(1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo(folder, clips=12, stills=8, held_out=4)
    return folder


@pytest.fixture
def sat_args(process_group: None, demo: Path) -> Callable[..., Namespace]:
    """The arguments that SAT hands to `create_dataset_function`."""

    def make(**changes: Any) -> Namespace:
        values = {
            "train_data": [str(demo / "train")],
            "valid_data": [str(demo / "heldout")],
            "test_data": None,
            "train_data_weights": None,
            "iterable_dataset": "custom",
            "iterable_dataset_eval": "custom",
            "batch_size": 2,
            "eval_batch_size": None,
            "eval_iters": 3,
            "gradient_accumulation_steps": 1,
            "num_workers": 0,
            "prefetch_factor": 2,
            "fp16": False,
            "bf16": True,
            "seed": 1234,
            "save": "ckpts",
            "load": None,
            "mode": "pretrain",
            "model_parallel_size": 1,
        }
        return Namespace(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def configure(demo: Path) -> Callable[..., list[str]]:
    """Writes the YAML of a small run on the demo's data, and gives its arguments."""
    return partial(write_config, demo)


@pytest.fixture(scope="session")
def saved(server: Server, configure: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 2 ranks under ZeRO-2, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    finish(server.start(configure(folder, stage=2, **QUICK), world=2, folder=folder))
    return folder_of(folder / "save")


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """`tmp_path / "save"`, a file system of its own of the parameter's size ("300k")."""
    folder = tmp_path / "save"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here, which takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
