"""`checkpoint: full` under CogVideo's unmodified script: killed and resumed, it goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import HERE, ROOT, Checkout

STEPS = 6


class Trial:
    """Runs of the checkout's script on 2 ranks, with one folder for checkpoints."""

    def __init__(self, checkout: Checkout, media: Path, folder: Path, model: str) -> None:
        self.checkout, self.folder, self.model = checkout, folder, model
        base = model.removesuffix("_lora")
        frames = [9, 17] if checkout.generation == "1.0" else [5, 13]  # 1.5 wants an even number of latents
        self.settings: dict[str, Any] = {
            "args": {
                "experiment_name": "run", "save": str(folder / "save"), "train_data": [str(media / "train")],
                "valid_data": [str(media / "heldout")], "load": str(checkout.tiny / base / "transformer"),
                "checkpoint": "full", "keep_last": 2, "train_iters": STEPS, "save_interval": 2,
                "eval_interval": 2, "eval_iters": 1, "num_workers": 1,
            },
            "data": {"params": {"video_size": list(tiny.SIZE), "fps": 8, "buckets": {"frames": frames}}},
            "model": {} if checkout.generation == "1.0" else {"latent_input": False},  # pixels, not latents
            "deepspeed": {"zero_optimization": {"stage": 2}},
        }  # fmt: skip

    def start(self, name: str, **args: Any) -> subprocess.Popen[str]:
        """Launch it; its losses go to `<folder>/<name>`, one file for each rank."""
        settings = {**self.settings, "args": {**self.settings["args"], **args}}
        own = tiny.write_yaml(self.folder / f"{name}.yaml", settings)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        tiny_ = self.checkout.tiny
        environment = os.environ | {
            "COGVIDEO_SAT": str(self.checkout.sat), "ON_CPU_RECORD": str(self.folder / name),
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        command += [str(HERE / "on_cpu.py"), "--base", str(tiny_ / f"{self.model}.yaml")]
        command += [str(tiny_ / "sft.yaml"), str(tiny_ / "data.yaml"), str(own)]
        log = (self.folder / f"{name}.log").open("w")
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def finish(self, process: subprocess.Popen[str], name: str) -> None:
        try:
            assert process.wait(timeout=1500) == 0, (self.folder / f"{name}.log").read_text()[-4000:]
        finally:
            end(process)

    def losses(self, name: str, rank: int) -> list[dict[str, Any]]:
        file = self.folder / name / f"{rank}.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [r for r in records if r["split"] == "train"]


def end(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and its ranks, each of which torchrun has made a group of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = children.read_text().split() if children.exists() else []
    for group in [process.pid, *map(int, ranks)]:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.wait()


@pytest.mark.multiprocess
def test_a_killed_run_goes_on_bit_for_bit(checkout: Checkout, media: Path, tmp_path: Path) -> None:
    """A LoRA of 1.0, and all weights of 1.5, which is published with no YAML for a LoRA."""
    names = [n for n in tiny.model_names(checkout.sat) if "i2v" not in n]
    model = next((n for n in names if n.endswith("_lora")), names[0])
    whole = Trial(checkout, media, tmp_path / "whole", model)
    whole.folder.mkdir()
    whole.finish(whole.start("unbroken"), "unbroken")
    reference = [whole.losses("unbroken", rank) for rank in range(2)]
    assert [len(r) for r in reference] == [STEPS, STEPS]

    trial = Trial(checkout, media, tmp_path / "killed", model)
    trial.folder.mkdir()
    process = trial.start("first")
    deadline = time.monotonic() + 400
    while len(trial.losses("first", 0)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    end(process)
    (run,) = (trial.folder / "save").glob("run-*")
    saved = int((run / "latest").read_text())
    trial.finish(trial.start("second", mode="pretrain", load=str(run)), "second")
    for rank in range(2):
        first = trial.losses("first", rank)
        assert first == reference[rank][: len(first)]
        assert trial.losses("second", rank) == reference[rank][saved:]

    file = run / str(STEPS) / "mp_rank_00_model_states.pt"
    names = list(torch.load(file, weights_only=True)["module"])
    assert names and not any(name.startswith(("first_stage_model.", "conditioner.")) for name in names)
    if model.endswith("_lora"):
        assert any("matrix_A" in name for name in names)
        base = checkout.tiny / model.removesuffix("_lora") / "transformer" / "1" / file.name
        assert file.stat().st_size < base.stat().st_size / 4
