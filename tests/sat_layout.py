"""State dicts as CogVideo's modules have them, small.

Names and shapes are written down from sat/dit_video_concat.py and sat/vae_modules/cp_enc_dec.py, without the
package's own table of names. The values of the position embeddings alone are the package's (its `positions`);
tests/cogvideo/test_convert_original.py holds those against CogVideo's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_ext.checkpoint.manifest import Base, Manifest, RateState, write_manifest
from sat_ext.convert.parts import UNREAD, computed
from sat_ext.types import Bucket

SIZE = Bucket(frames=9, height=64, width=64)
HIDDEN, HEAD, TIME, TEXT, TEXT_LENGTH, LAYERS = 32, 16, 32, 32, 226, 2
_SMALL: dict[str, Any] = {
    "num_layers": LAYERS, "num_attention_heads": HIDDEN // HEAD, "attention_head_dim": HEAD, "in_channels": 16,
    "out_channels": 16, "time_embed_dim": TIME, "text_embed_dim": TEXT, "max_text_seq_length": TEXT_LENGTH,
    "sample_height": SIZE.height // 8, "sample_width": SIZE.width // 8, "sample_frames": SIZE.frames,
}  # fmt: skip
_ROTARY = {"use_rotary_positional_embeddings": True}
_SECOND = {**_ROTARY, "patch_size_t": 2, "patch_bias": False}
# The published models, as diffusers' config.json has them.
FAMILIES: dict[str, dict[str, Any]] = {
    "2b": {**_SMALL, "spatial_interpolation_scale": 1.875},
    "5b": {**_SMALL, **_ROTARY},
    "5b-i2v": {**_SMALL, **_ROTARY, "in_channels": 32, "use_learned_positional_embeddings": True},
    "1.5-5b": {**_SMALL, **_SECOND},
    "1.5-5b-i2v": {**_SMALL, **_SECOND, "in_channels": 32, "ofs_embed_dim": 32},
}
AUTOENCODER = {
    "block_out_channels": [32, 32, 32, 64], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
}  # fmt: skip


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def sat_transformer(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint's `module`."""
    config = FAMILIES[family]
    second, channels = "patch_size_t" in config, config["in_channels"]
    shapes = _linear("time_embed.0", TIME, HIDDEN) | _linear("time_embed.2", TIME, TIME)
    if "ofs_embed_dim" in config:
        shapes |= _linear("ofs_embed.0", 32, 32) | _linear("ofs_embed.2", 32, 32)
    shapes["mixins.patch_embed.proj.weight"] = (HIDDEN, channels * 8) if second else (HIDDEN, channels, 2, 2)
    shapes["mixins.patch_embed.proj.bias"] = (HIDDEN,)
    shapes |= _linear("mixins.patch_embed.text_proj", HIDDEN, TEXT)
    for i in range(LAYERS):
        layer, norms = f"transformer.layers.{i}", "mixins.adaln_layer"
        shapes |= _linear(f"{norms}.adaLN_modulations.{i}.1", 12 * HIDDEN, TIME)
        shapes |= _norm(f"{norms}.query_layernorm_list.{i}", HEAD) | _norm(f"{norms}.key_layernorm_list.{i}", HEAD)
        shapes |= _norm(f"{layer}.input_layernorm", HIDDEN) | _norm(f"{layer}.post_attention_layernorm", HIDDEN)
        shapes |= _linear(f"{layer}.attention.query_key_value", 3 * HIDDEN, HIDDEN)
        shapes |= _linear(f"{layer}.attention.dense", HIDDEN, HIDDEN)
        shapes |= _linear(f"{layer}.mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN)
        shapes |= _linear(f"{layer}.mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN)
    shapes |= _norm("transformer.final_layernorm", HIDDEN) | _norm("mixins.final_layer.norm_final", HIDDEN)
    shapes |= _linear("mixins.final_layer.linear", 16 * (8 if second else 4), HIDDEN)
    shapes |= _linear("mixins.final_layer.adaLN_modulation.1", 2 * HIDDEN, TIME)
    if family != "2b":
        shapes["transformer.position_embeddings.weight"] = (64, HIDDEN)  # SAT's own, never read
    if family == "5b-i2v":
        shapes["mixins.pos_embed.pos_embedding"] = (1, TEXT_LENGTH + 3 * 4 * 4, HIDDEN)
    weights = _random(shapes, dtype)
    defaults = {"patch_size": 2, "patch_size_t": None, "use_rotary_positional_embeddings": False}
    positions = computed({**defaults, "spatial_interpolation_scale": 1.875, **config}, dtype)
    weights |= {name: tensor for name, tensor in positions.items() if name != UNREAD}
    return {f"model.diffusion_model.{name}": t for name, t in weights.items()}


def sat_autoencoder() -> dict[str, Tensor]:
    """A 3d-vae.pt's `state_dict`."""
    channels, blocks, latent = (32, 32, 32, 64), 2, 4
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, *kernel: int) -> None:
        shapes.update({f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)})

    def norm(name: str, width: int, decodes: bool) -> None:
        shapes.update(_norm(f"{name}.norm_layer" if decodes else name, width))
        for part in ("conv_y", "conv_b") if decodes else ():
            conv(f"{name}.{part}.conv", width, latent, 1, 1, 1)

    def block(name: str, into: int, out: int, decodes: bool) -> None:
        norm(f"{name}.norm1", into, decodes)
        conv(f"{name}.conv1.conv", out, into, 3, 3, 3)
        norm(f"{name}.norm2", out, decodes)
        conv(f"{name}.conv2.conv", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1, 1, 1)

    for side, decodes in (("encoder", False), ("decoder", True)):
        edge = (channels[0], 3) if not decodes else (channels[-1], latent)
        conv(f"{side}.conv_in.conv", *edge, 3, 3, 3)
        width = edge[0]
        levels = range(4) if not decodes else reversed(range(4))
        for level in levels:
            name = f"{side}.{'up' if decodes else 'down'}.{level}"
            for i in range(blocks + decodes):
                block(f"{name}.block.{i}", width, channels[level], decodes)
                width = channels[level]
            if level != (0 if decodes else 3):
                conv(f"{name}.{'upsample' if decodes else 'downsample'}.conv", width, width, 3, 3)
        for i in (1, 2):
            block(f"{side}.mid.block_{i}", channels[-1], channels[-1], decodes)
        norm(f"{side}.norm_out", width, decodes)
        conv(f"{side}.conv_out.conv", 3 if decodes else 2 * latent, width, 3, 3, 3)
    return _random(shapes, torch.float32)


def _random(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 0.1).to(dtype) for name, shape in shapes.items()}


def write_sat(folder: Path, weights: dict[str, Tensor]) -> Path:
    """A folder as SAT's load_checkpoint reads it; the file in it."""
    (folder / "1").mkdir(parents=True)
    (folder / "latest").write_text("1")
    file = folder / "1" / "mp_rank_00_model_states.pt"
    torch.save({"module": weights}, file)
    return file


def write_base(folder: Path, path: Path, iteration: int) -> None:
    """The `sat_ext.json` of a checkpoint whose missing weights are those of a run's folder `path`."""
    rate = RateState(num_iters=1, init_step=0, auto_warmup_steps=0, auto_warmup_rate=0.0)
    manifest = Manifest(
        sat_ext="0", iteration=1, micro_steps=1, world=1, zero_stage=0, round_robin=False, seed=0, global_steps=1,
        global_samples=1, skipped_steps=0, whole=False, base=Base(path=str(path), iteration=iteration), rate=rate,
        cells=(), files={},
    )  # fmt: skip
    write_manifest(folder, manifest)
