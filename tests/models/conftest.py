"""Real CogVideoX models made small, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from sat_ext.models.engine import VideoDiffusionEngine

# The five published models' architectures, small. Native size: 9 frames of 64x64 pixels.
SMALL = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "max_text_seq_length": 8,
    "sample_height": 8,
    "sample_width": 8,
    "sample_frames": 9,
}
ROTARY = {"use_rotary_positional_embeddings": True}
GENERATION_1_5 = {**ROTARY, "patch_size_t": 2, "patch_bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "2b": {"transformer": SMALL},
    "5b": {"transformer": {**SMALL, **ROTARY}},
    "5b-i2v": {
        "conditioning": "i2v",
        "transformer": {**SMALL, **ROTARY, "in_channels": 32, "use_learned_positional_embeddings": True},
    },
    "1.5-5b": {"transformer": {**SMALL, **GENERATION_1_5}},
    "1.5-5b-i2v": {
        "conditioning": "i2v",
        "transformer": {**SMALL, **GENERATION_1_5, "in_channels": 32, "ofs_embed_dim": 32},
    },
}


def small_config(family: str, **changes: Any) -> dict[str, Any]:
    """The `model:` section of one of `FAMILIES`, weights random, on the cosine first stage."""
    return {"first_stage": {"kind": "cosine"}, "text": {"kind": "byt5"}, **FAMILIES[family], **changes}


def make_engine(model_config: Mapping[str, Any]) -> VideoDiffusionEngine:
    torch.manual_seed(0)
    return VideoDiffusionEngine(SimpleNamespace(model_config=model_config))


def make_batch(frames: int, count: int = 2, size: int = 32, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(frames)
    coarse = torch.rand(count, frames, 3, size // 8, size // 8, generator=generator) * 2 - 1
    return {
        "mp4": coarse.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4),
        "txt": [f"caption {i}" for i in range(count)],
        "kind": ["image" if frames == 1 else "video"] * count,
        "key": [f"{i}.mp4" for i in range(count)],
        "source": ["clips"] * count,
        "seed": 0,
        **changes,
    }


class Seen:
    """What the transformer was called with, call by call."""

    def __init__(self, engine: VideoDiffusionEngine) -> None:
        self.calls: list[dict[str, Any]] = []
        engine.network.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        (group,) = args[0]
        self.calls.append({"latents": group.latents, "text": group.text, "timestep": group.timesteps, **kwargs})

    def latents(self, call: int = -1) -> torch.Tensor:
        states: torch.Tensor = self.calls[call]["latents"]
        return states[:, :, :16]

    def condition(self, call: int = -1) -> torch.Tensor:
        states: torch.Tensor = self.calls[call]["latents"]
        return states[:, :, 16:]


def write_pretrained(folder: Path, family: str = "5b-i2v", snr_shift_scale: float = 1.0, **vae: Any) -> Path:
    """A folder as published models have it, with small random weights."""
    torch.manual_seed(3)
    architecture = {**FAMILIES[family]["transformer"]}
    channels = 4
    architecture["out_channels"] = channels
    architecture["in_channels"] = channels * (2 if "i2v" in family else 1)
    CogVideoXTransformer3DModel(**architecture).save_pretrained(folder / "transformer")
    AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        **{"scaling_factor": 0.7, **vae},
    ).save_pretrained(folder / "vae")
    config = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=384)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        snr_shift_scale=snr_shift_scale,
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pretrained(family)` is the folder of a small published-like model, written once a session."""
    written: dict[str, Path] = {}

    def folder(family: str = "5b-i2v") -> Path:
        if family not in written:
            written[family] = write_pretrained(tmp_path_factory.mktemp(family), family)
        return written[family]

    return folder
