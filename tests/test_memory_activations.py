"""The planner's activations against the real transformer: at published sizes on tensors without memory, and small
ones for real.

What is published of peaks, for orientation (GB on one GPU): LoRA of CogVideoX-5B-I2V 78 with SAT, 24 with
diffusers' `finetune/`. The weights alone are 11.1 (5.57e9 parameters).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_ext.config import read_yaml
from sat_ext.memory.activations import activations, block
from sat_ext.memory.counts import count
from sat_ext.memory.run import Run, run_from, sizes
from sat_ext.models.config import GradientCheckpointing, TextConfig, transformer_of
from sat_ext.models.transformer import build_transformer, rotary_embedding
from sat_ext.recipe import recipe_of
from sat_ext.types import Bucket
from tests.fakes import faked, saved_bytes

CONFIGS = Path(__file__).parent.parent / "configs"
LAYERS = 4
CLIP, STILLS = Bucket(frames=49, height=480, width=720), Bucket(frames=1, height=480, width=720)
STATISTIC = {2: 2, 4: 4}  # on a CPU, norms keep their statistics in the dtype of their input


def run_of(name: str, mode: str, bucket: Bucket, samples: int = 1, layers: int = LAYERS, **model: Any) -> Run:
    config = read_yaml([str(CONFIGS / "model" / f"{name}.yaml")])
    config["model"]["transformer"]["num_layers"] = layers
    config["model"] |= {"train": {"mode": mode, "rank": 128}, **model}
    config["data"] = {"params": {"video_size": [bucket.height, bucket.width], "max_num_frames": bucket.frames}}
    config["deepspeed"] = {"bf16": {"enabled": True}}
    return replace(run_from(recipe_of(config)), batches={bucket: samples})


class Measured:
    """One training step: the peak of its backward pass, and the gradients of weights at its end; or, where that is
    what is asked, the bytes that autograd saved."""

    peak = gradients = saved = 0

    def __init__(self, run: Run, *, saving: bool = False) -> None:
        dtype = torch.bfloat16 if run.itemsize == 2 else torch.float32
        model = replace(run.model, pretrained=None, text=TextConfig(kind="byt5"))
        with torch.device("meta"):
            network = build_transformer(model, dtype)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not run.lora or "lora_" in name)
        with faked(network.train(), dtype) as live:
            before = live.mark()
            inputs = self._inputs(run)
            if saving:  # which keeps what was saved
                with saved_bytes(network, partial(setattr, self, "saved")):
                    network(**inputs, return_dict=False)
                return
            loss = network(**inputs, return_dict=False)[0].float().square().mean()
            live.mark()
            loss.backward()
            self.peak = live.peak - before
            self.gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)

    def _inputs(self, run: Run) -> dict[str, Any]:
        transformer, ((bucket, samples),) = transformer_of(run.model), run.batches.items()
        patch = transformer.patch_size_t or 1
        frames = -(-((bucket.frames - 1) // 4 + 1) // patch) * patch
        shape = (frames, transformer.in_channels, bucket.height // 8, bucket.width // 8)
        hidden = torch.empty(samples, *shape)
        return {
            "hidden_states": hidden,
            "encoder_hidden_states": torch.empty(
                samples, transformer.max_text_seq_length, transformer.text_embed_dim
            ),
            "timestep": torch.zeros(samples, dtype=torch.long),
            "ofs": None if transformer.ofs_embed_dim is None else hidden.new_full((1,), 2.0),
            "image_rotary_emb": rotary_embedding(run.model, *_grid(shape), hidden.device),
        }


def _grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[0], shape[2], shape[3]


PUBLISHED = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox-1.5-5b-i2v")


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("bucket", "samples"), [(CLIP, 1), (STILLS, 3)])
def test_a_block_saves_what_is_predicted(name: str, mode: str, bucket: Bucket, samples: int) -> None:
    less, more = (run_of(name, mode, bucket, samples, layers, gradient_checkpointing=False) for layers in (2, 4))
    measured = (
        Measured(more, saving=True).saved - Measured(less, saving=True).saved
    ) / 2  # without what is around the blocks
    predicted = block(more, sizes(more, bucket), STATISTIC[2]).saved
    assert predicted == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("name", PUBLISHED[1:])
def test_the_peak_of_the_backward_pass(name: str, mode: str, checkpointing: bool) -> None:
    run = run_of(name, mode, CLIP, gradient_checkpointing=checkpointing)
    found, measured = activations(run, sizes(run, CLIP), STATISTIC[2]), Measured(run)
    # in the last block that the backward pass comes to, two thirds of its own gradients are to come
    own = sum(p.numel for p in count(run).of_block() if p.trains) * run.itemsize
    predicted = max(found.on_gpu, found.at_end + measured.gradients - 2 * own // 3)
    assert predicted == pytest.approx(measured.peak, rel=0.05)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize(("samples", "frames", "size"), [(1, 9, 64), (3, 1, 96), (2, 5, 64)])
def test_small_blocks_for_real(mode: str, item: int, samples: int, frames: int, size: int) -> None:
    """What autograd saves on this machine. Attention on a CPU saves what flash attention on a GPU does."""
    bucket = Bucket(frames=frames, height=size, width=size)
    dtype = torch.bfloat16 if item == 2 else torch.float32
    found = []
    for layers in (1, 2, 3):
        run = replace(run_of("tiny", mode, bucket, samples, layers), itemsize=item)
        torch.manual_seed(0)
        network = build_transformer(run.model, torch.float32).to(dtype).train()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(mode == "full" or "lora_" in name)
        transformer, latents = transformer_of(run.model), (frames - 1) // 4 + 1
        hidden = torch.randn(samples, latents, transformer.in_channels, size // 8, size // 8, dtype=dtype)
        text = torch.randn(samples, transformer.max_text_seq_length, transformer.text_embed_dim, dtype=dtype)
        rotary = rotary_embedding(run.model, latents, size // 8, size // 8, hidden.device)
        with saved_bytes(network, found.append):
            network(hidden, text, torch.zeros(samples, dtype=torch.long), image_rotary_emb=rotary)
    predicted = block(run, sizes(run, bucket), STATISTIC[item]).saved
    assert predicted == pytest.approx(found[2] - found[1], rel=0.05)


def test_offloaded_checkpoints_wait_on_the_host() -> None:
    run = run_of("cogvideox-5b-i2v", "lora", CLIP, layers=42)
    offloading = replace(run, model=replace(run.model, gradient_checkpointing=GradientCheckpointing(offload=True)))
    kept, offloaded = (activations(r, sizes(r, CLIP)) for r in (run, offloading))
    inputs = block(run, sizes(run, CLIP)).input
    assert inputs == 17_776 * 3072 * 2
    assert (kept.on_host, offloaded.on_host) == (0, 42 * inputs)
    assert kept.on_gpu - offloaded.on_gpu == 40 * inputs  # 41 waited; one is on its way


def test_every_second_block_keeps_what_it_needs() -> None:
    run = run_of("cogvideox-5b-i2v", "lora", CLIP, layers=42)
    half = replace(run, model=replace(run.model, gradient_checkpointing=GradientCheckpointing(every=2)))
    one, size = block(run, sizes(run, CLIP)), sizes(run, CLIP)
    assert activations(half, size).on_gpu - activations(run, size).on_gpu == 21 * (one.saved - one.input)
