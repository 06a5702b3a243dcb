"""The planner's peaks of first stage and text encoder against the real ones, on tensors without memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from transformers import T5Config, T5EncoderModel

from sat_ext.config import read_yaml
from sat_ext.memory.counts import T5_XXL
from sat_ext.memory.encoders import decode_peak, encode_peak, text_peak
from sat_ext.memory.run import Run, run_from
from sat_ext.recipe import recipe_of
from sat_ext.types import Bucket
from tests.fakes import faked

MODEL = Path(__file__).parent.parent / "configs/model/cogvideox-5b.yaml"


def run_of(bucket: Bucket, samples: int = 1, **first_stage: Any) -> Run:
    model = {**read_yaml([str(MODEL)])["model"], "first_stage": first_stage}
    data = {"params": {"video_size": [bucket.height, bucket.width], "max_num_frames": bucket.frames}}
    run = run_from(recipe_of({"model": model, "data": data, "deepspeed": {"bf16": {"enabled": True}}}))
    return replace(run, batches={bucket: samples})


def autoencoder(run: Run) -> AutoencoderKLCogVideoX:
    kinds = {f"{k}_block_types": (f"CogVideoX{k.title()}Block3D",) * 4 for k in ("down", "up")}
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(block_out_channels=(128, 256, 256, 512), latent_channels=16, **kinds)
    first = run.model.first_stage
    vae.use_tiling, vae.use_slicing, vae.num_sample_frames_batch_size = first.tiling, first.slicing, first.frames
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("frames", "height", "width", "samples", "levers"),
    [
        (49, 480, 720, 1, {}),
        (1, 480, 720, 1, {}),
        (9, 480, 720, 1, {}),
        (17, 480, 720, 2, {}),
        (49, 480, 720, 1, {"frames": 4}),
        (49, 480, 720, 1, {"frames": 16}),
        (49, 480, 720, 2, {"slicing": True}),
        (1, 480, 720, 11, {"slicing": True}),
        (17, 480, 720, 1, {"tiling": True}),
        (17, 768, 1360, 1, {}),  # its convolutions are done in parts
        (49, 768, 1360, 1, {"frames": 16}),
    ],
)
def test_encoding(frames: int, height: int, width: int, samples: int, levers: dict[str, Any]) -> None:
    bucket = Bucket(frames=frames, height=height, width=width)
    run = run_of(bucket, samples, **levers)
    vae = autoencoder(run)
    with faked(vae, torch.bfloat16) as live, torch.no_grad():
        before = live.mark()
        pixels = torch.empty(samples, 3, frames, height, width)
        vae.encode(pixels).latent_dist.sample()
        as_bytes = pixels.numel()  # uint8, as they came
        assert encode_peak(run, bucket) == pytest.approx(live.peak - before + as_bytes, rel=0.02)


@pytest.mark.parametrize("frames", [1, 9, 17])
def test_decoding_in_tiles(frames: int) -> None:
    bucket = Bucket(frames=frames, height=480, width=720)
    run = run_of(bucket, tiling=True)
    vae = autoencoder(run)
    with faked(vae, torch.bfloat16) as live, torch.no_grad():
        before = live.mark()
        vae.decode(torch.empty(1, 16, (frames - 1) // 4 + 1, 60, 90))
        assert decode_peak(run, bucket) == pytest.approx(live.peak - before, rel=0.05)


@pytest.mark.parametrize("samples", [1, 11])
def test_captions(samples: int) -> None:
    bucket = Bucket(frames=1, height=480, width=720)
    run = run_of(bucket, samples)
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**{**T5_XXL, "num_layers": 2})).eval().requires_grad_(False)
    with faked(encoder, torch.bfloat16) as live, torch.no_grad():
        before = live.mark()
        encoder(torch.zeros(samples, 226, dtype=torch.long))
        measured = live.peak - before
    # a few per mille of a GPU: that it is no less, and of that order, is enough
    assert measured <= text_peak(run, bucket) <= 1.6 * measured


def test_what_is_cached_or_on_the_cpu_has_no_peak() -> None:
    bucket = Bucket(frames=49, height=480, width=720)
    cached = replace(run_of(bucket), cached=True, cached_text=True)
    assert encode_peak(cached, bucket) == text_peak(cached, bucket) == 0
    run = run_of(bucket)
    on_cpu = replace(run, model=replace(run.model, text=replace(run.model.text, device="cpu")))
    assert text_peak(on_cpu, bucket) == 0 < text_peak(run, bucket)
