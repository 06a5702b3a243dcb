"""The diffusion transformer: diffusers' CogVideoX module, for any frame count and size, with LoRA."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import CogVideoXPatchEmbed
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from sat_ext.cogvideox import OFS, Grid, latent_frames, learned_positions, rotary_table
from sat_ext.errors import ConfigError
from sat_ext.models.block_swap import swap_blocks
from sat_ext.models.checkpointing import Checkpointing
from sat_ext.models.config import TARGETS, ModelConfig, TrainConfig
from sat_ext.models.packs import Group, PackedTransformer, pack_blocks
from sat_ext.models.quantize import quantize_blocks


class LearnedPatchEmbed(CogVideoXPatchEmbed):
    """CogVideoX-5B-I2V's patch embedding, for other sizes and frame counts than the native ones too.

    diffusers' own raises for another size, and for another frame count takes sines that the model never saw.
    Here fewer frames take the first ones' embeddings, and other sizes take them resized."""

    pos_embedding: Tensor

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Tokens (B, text + T * H/2 * W/2, D) of text (B, text, E) and latents (B, T, C, H, W)."""
        batch, frames, _, height, width = image_embeds.shape
        patches = self.proj(image_embeds.flatten(0, 1))  # (B T, D, H/2, W/2)
        tokens = patches.reshape(batch, frames, *patches.shape[1:]).flatten(3).transpose(2, 3).flatten(1, 2)
        grid = (height // self.patch_size, width // self.patch_size)
        positions = self.positions(frames, *grid).to(tokens.dtype)
        text = self.text_proj(text_embeds) + self.pos_embedding[:, : text_embeds.shape[1]].to(tokens.dtype)
        return torch.cat([text, tokens + positions], dim=1)

    def positions(self, frames: int, rows: int, columns: int) -> Tensor:
        """The learned embedding for a grid of patches, (1, frames * rows * columns, D)."""
        native = (self.sample_height // self.patch_size, self.sample_width // self.patch_size)
        learned = self.pos_embedding[:, self.max_text_seq_length :]
        length = learned.shape[1] // (native[0] * native[1])
        return learned_positions(learned, Grid(length, *native), Grid(frames, rows, columns))


def rotary_embedding(
    config: ModelConfig, frames: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines for latents of this shape (padding included), or None for a model without them.

    1.0 models stretch the native grid over the frame, 1.5 models count patches."""
    transformer = config.transformer
    if not transformer.use_rotary_positional_embeddings:
        return None
    patch, patch_t = transformer.patch_size, transformer.patch_size_t
    grid = Grid(frames // (patch_t or 1), height // patch, width // patch)
    rows, columns = transformer.sample_height // patch, transformer.sample_width // patch
    native = Grid(latent_frames(transformer.sample_frames), rows, columns) if patch_t is None else None
    return rotary_table(grid, transformer.attention_head_dim, stretch_to=native, device=device)


def predict_velocity(
    network: PackedTransformer, config: ModelConfig, groups: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> list[Tensor]:
    """The velocity (B, T, C, H, W) for each group of (inputs, text, timesteps).

    `inputs` (B, T, C, H, W) are noisy latents, followed in C by the condition of I2V models; `text` is (B, L, E).
    """
    packed = []
    for inputs, text, timesteps in groups:
        frames, _, height, width = inputs.shape[1:]
        rotary = rotary_embedding(config, frames, height, width, inputs.device)
        latents, text = inputs.to(network.dtype), text.to(network.dtype)
        packed.append(Group(latents=latents, text=text, timesteps=timesteps, rotary=rotary))
    return network(packed, ofs=None if config.transformer.ofs_embed_dim is None else OFS)


def build_transformer(config: ModelConfig, dtype: torch.dtype) -> PackedTransformer:
    """The transformer of the pretrained folder, or one of random weights, with LoRA's adapters and the levers."""
    pretrained, train = config.pretrained, config.train
    if pretrained is not None:
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            pretrained, subfolder="transformer", torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    else:
        transformer = CogVideoXTransformer3DModel(**asdict(config.transformer))
        if train.mode == "full":  # closed gates would keep every gradient from adapters
            _start_at_identity(transformer)
    if config.transformer.use_learned_positional_embeddings:
        embed = transformer.patch_embed
        embed.__class__ = LearnedPatchEmbed  # same weights, same names in the checkpoint
        if train.mode == "full":  # a buffer in diffusers, which would never train; CogVideo trains it
            positions = embed._buffers.pop("pos_embedding").to(embed.proj.weight.dtype)
            embed.pos_embedding = nn.Parameter(positions, requires_grad=False)  # until the engine says so
    transformer = pack_blocks(transformer)
    blocks = transformer.transformer_blocks
    # In this order: PEFT wraps the quantized layers, and what is swapped is what is frozen beside its adapters.
    if train.quantization != "none":
        # a folder gives its weights again, random ones are in the checkpoint alone
        quantize_blocks(blocks, train.quantization, in_state_dict=pretrained is None)
    if train.mode == "lora":
        _add_lora(transformer, train)
    if config.block_swap:
        swap_blocks(blocks, config.block_swap)
    if config.checkpointing is not None:
        transformer.enable_gradient_checkpointing(Checkpointing(blocks, config.checkpointing))
    return transformer


def _start_at_identity(transformer: CogVideoXTransformer3DModel) -> None:
    # as CogVideo does (`AdaLNMixin.reinit` in sat/dit_video_concat.py); diffusers' module does not
    for module in transformer.modules():
        if isinstance(module, CogVideoXLayerNormZero):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)


def _add_lora(transformer: CogVideoXTransformer3DModel, train: TrainConfig) -> None:
    layers = {
        # a name is of all blocks, as the planner measures one of them for all
        name: re.sub(r"^transformer_blocks\.\d+\.", "", name)
        for name, module in transformer.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    adapted: set[str] = set()
    for target in train.targets:
        named = {name for name, kind in layers.items() if f".{target}." in f".{kind}."}
        if not named:
            raise ConfigError(
                f"model.train.target_modules: no layer of the transformer is called '{target}'; write "
                f"{' or '.join(TARGETS)}, or a list of {', '.join(dict.fromkeys(layers.values()))}."
            )
        adapted |= named
    lora = LoraConfig(
        r=train.rank, lora_alpha=train.alpha, target_modules=sorted(adapted), use_rslora=train.rslora,
        use_dora=train.dora,
    )  # fmt: skip
    transformer.add_adapter(lora)
    for name in adapted if train.dora else ():
        transformer.get_submodule(name).register_load_state_dict_post_hook(partial(_measure_norms, name))


def _measure_norms(name: str, layer: Any, keys: _IncompatibleKeys) -> None:
    """DoRA begins with the norms of the base's rows, which are others after weights without its own are loaded."""
    if not any(key.endswith(f"{name}.lora_magnitude_vector.default.weight") for key in keys.missing_keys):
        return
    dora = layer.lora_magnitude_vector["default"]
    magnitude, (a, b) = dora.weight, (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    dora.update_layer(base_layer=layer.get_base_layer(), lora_A=a, lora_B=b, scaling=layer.scaling["default"])
    magnitude.data.copy_(dora.weight)
    dora.weight = magnitude  # the same parameter as before


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Inside, the model is its base."""
    on = [m for m in network.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for layer in on:
        layer._disable_adapters = True  # not `enable_adapters(False)`, which also freezes what DeepSpeed trains
    try:
        yield
    finally:
        for layer in on:
            layer._disable_adapters = False
