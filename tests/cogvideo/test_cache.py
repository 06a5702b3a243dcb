"""CogVideo's unmodified script trains from what `sat-ext cache` made with CogVideo's own encoders."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import HERE, ROOT, Checkout, Launch

from sat_ext.cogvideo.cogvideo_encoders import fingerprints
from sat_ext.latents.store import LatentStore, _entries_in

pytestmark = pytest.mark.multiprocess
MODELS = {
    "t2v": {"1.0": ("cogvideox_2b", ["joint"]), "1.5": ("cogvideox1.5_5b", ["joint", "1.5"])},
    "i2v": {
        "1.0": ("cogvideox_5b_i2v_lora", ["joint", "i2v"]),
        "1.5": ("cogvideox1.5_5b_i2v", ["joint", "1.5", "i2v", "lora"]),
    },
}


def write_cache(checkout: Checkout, media: Path, model: str, overlays: list[str], folder: Path) -> dict[str, Any]:
    own: dict[str, Any] = {
        "args": {"train_data": [str(media / "train")], "valid_data": None},
        "data": {"params": {"video_size": list(tiny.SIZE), "fps": 8, "buckets": {"frames": [1, 9, tiny.FRAMES]}}},
    }
    files = [checkout.tiny / f"{model}.yaml", checkout.tiny / "sft.yaml"]
    files += [ROOT / "configs" / "cogvideo" / f"{name}.yaml" for name in overlays]
    files.append(tiny.write_yaml(folder / "cache.yaml", own))
    done = subprocess.run(
        [
            sys.executable, str(HERE / "on_cpu.py"), "sat-ext", "cache", "--base", *map(str, files), "--json",
            "-o", str(folder / "cache"),
        ],
        env=os.environ | {"COGVIDEO_SAT": str(checkout.sat), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_run_from_a_cache_trains_on_both_kinds(
    kind: str, checkout: Checkout, launch: Launch, media: Path, tmp_path: Path
) -> None:
    model, overlays = MODELS[kind][checkout.generation]
    facts = write_cache(checkout, media, model, overlays, tmp_path)
    assert facts["samples"] == facts["encoded"] == 12 and facts["captions_encoded"] == 13
    cache = tmp_path / "cache"
    store = LatentStore(cache)
    for file in cache.glob("latents-*"):
        for entry in _entries_in(file):
            parts = store.read(entry.key)
            frames = (int(entry.size.split("x")[0]) - 1) // 4 + 1
            assert parts["mean"].shape == parts["std"].shape == (frames, 16, tiny.SIZE[0] // 8, tiny.SIZE[1] // 8)
            assert ("noisy" in parts) == (kind == "i2v" and frames > 1)
    overlay = yaml.safe_load((ROOT / "configs" / "cogvideo" / "cached.yaml").read_text())
    embedders = overlay["model"]["conditioner_config"]["params"]["emb_models"]
    embedders[0]["params"]["folder"] = str(cache)
    settings = {
        "data": {"params": {"cache": {"folder": str(cache)}}},
        "model": {"conditioner_config": {"params": {"emb_models": embedders}}},
    }
    # neither T5 nor the autoencoder is there any more
    hidden = [checkout.tiny / "t5" / "model.safetensors"]
    for file in hidden:
        file.rename(file.with_suffix(".hidden"))
    try:
        run = launch(
            model, [*overlays, "cached"], settings, launcher="torchrun", train_iters=4, valid_data=None,
            eval_interval=None, save_interval=4,
        )  # fmt: skip
    finally:
        for file in hidden:
            file.with_suffix(".hidden").rename(file)
    for rank in range(2):
        assert run.kinds(rank=rank) == {"image", "video"}
        assert all(math.isfinite(loss) and loss > 0 for loss in run.losses(rank))
        assert all(step["shape"][2] == 16 for step in run.steps(rank=rank))


def test_a_cache_is_of_the_scale_that_its_conditions_were_written_with() -> None:
    """And of no `condition_scale`: the loss brings them to it."""

    def stage(scale_factor: float, **loss: float) -> str:
        embedder = {"params": {"max_length": 226}}
        model = {
            "scale_factor": scale_factor, "first_stage_config": {}, "loss_fn_config": {"params": loss},
            "conditioner_config": {"params": {"emb_models": [embedder]}},
        }  # fmt: skip
        return fingerprints(model, torch.bfloat16).first_stage

    assert stage(0.7) != stage(1.0)
    assert stage(0.7, condition_scale=1.0) == stage(0.7)


@pytest.mark.parametrize(
    ("overlays", "settings", "message"),
    [
        (["cached"], {}, "error: cache: there are no text embeddings here; write them with sat-ext cache."),
        ([], {"data": {"params": {"cache": {"folder": "nowhere"}}}}, "append configs/cogvideo/cached.yaml"),
        (
            ["cached"],
            {"args": {"eval_interval": 1}},
            "evaluations decode samples, and a run from data.params.cache",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_told_before_the_first_step(
    checkout: Checkout, launch: Launch, overlays: list[str], settings: dict[str, Any], message: str
) -> None:
    model, own = MODELS["t2v"][checkout.generation]
    run = launch(
        model, [*own, *overlays], settings, fails=True, train_iters=2, valid_data=None, eval_interval=None
    )
    assert message in run.log and not any(run.records)
