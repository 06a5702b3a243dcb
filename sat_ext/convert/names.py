"""Which tensor of SAT's layout is which of diffusers': one table for both directions.

A tensor of CogVideo's network is one of diffusers', or several stacked along its rows (q, k and v; the modulation
of attention and of the feed-forward part). The transformer's names are those under `model.diffusion_model.` in a
checkpoint. Sources: `DiffusionTransformer` in sat/dit_video_concat.py, `ContextParallelEncoder3D` and
`ContextParallelDecoder3D` in sat/vae_modules/cp_enc_dec.py of CogVideo (tag v1.0 and main); diffusers'
`CogVideoXTransformer3DModel` and `AutoencoderKLCogVideoX`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sat_ext.errors import ConfigError

SUFFIXES = (".weight", ".bias", "")  # "" for a parameter that belongs to no layer


@dataclass(frozen=True)
class LayerNames:
    """One layer of SAT's, whose rows are equal blocks, and diffusers' layers with the blocks of each."""

    sat: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def same(sat: str, diffusers: str) -> LayerNames:
    """A layer that both have."""
    return LayerNames(sat, ((diffusers, (0,)),))


def transformer_rows(layers: int) -> list[LayerNames]:
    """The table of a transformer with `layers` layers, including what only some models have."""
    rows = [
        same("time_embed.0", "time_embedding.linear_1"),
        same("time_embed.2", "time_embedding.linear_2"),
        same("ofs_embed.0", "ofs_embedding.linear_1"),
        same("ofs_embed.2", "ofs_embedding.linear_2"),
        same("mixins.patch_embed.proj", "patch_embed.proj"),
        same("mixins.patch_embed.text_proj", "patch_embed.text_proj"),
        same("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding"),
        same("transformer.final_layernorm", "norm_final"),
        same("mixins.final_layer.norm_final", "norm_out.norm"),
        same("mixins.final_layer.adaLN_modulation.1", "norm_out.linear"),
        same("mixins.final_layer.linear", "proj_out"),
    ]
    for i in range(layers):
        layer, block, norms = f"transformer.layers.{i}", f"transformer_blocks.{i}", "mixins.adaln_layer"
        attention = f"{block}.attn1"
        rows += [
            # blocks of `AdaLNMixin.layer_forward`: shift, scale, gate of the attention's input, then of the
            # feed-forward's; the video's six, then the text's. diffusers keeps video and text of a norm together.
            LayerNames(
                f"{norms}.adaLN_modulations.{i}.1",
                ((f"{block}.norm1.linear", (0, 1, 2, 6, 7, 8)), (f"{block}.norm2.linear", (3, 4, 5, 9, 10, 11))),
            ),
            LayerNames(
                f"{layer}.attention.query_key_value",
                ((f"{attention}.to_q", (0,)), (f"{attention}.to_k", (1,)), (f"{attention}.to_v", (2,))),
            ),
            same(f"{layer}.attention.dense", f"{attention}.to_out.0"),
            same(f"{norms}.query_layernorm_list.{i}", f"{attention}.norm_q"),
            same(f"{norms}.key_layernorm_list.{i}", f"{attention}.norm_k"),
            same(f"{layer}.input_layernorm", f"{block}.norm1.norm"),
            same(f"{layer}.post_attention_layernorm", f"{block}.norm2.norm"),
            same(f"{layer}.mlp.dense_h_to_4h", f"{block}.ff.net.0.proj"),
            same(f"{layer}.mlp.dense_4h_to_h", f"{block}.ff.net.2"),
        ]
    return rows


def adapter_rows(layers: int) -> list[LayerNames]:
    """The layers that SAT's LoRA (`sat.model.finetune.lora2.LoraMixin`) gives matrices, a pair for each block."""
    return [r for r in transformer_rows(layers) if r.sat.endswith((".query_key_value", ".attention.dense"))]


def autoencoder_rows(levels: int, resnets: int) -> list[LayerNames]:
    """The table of an autoencoder with `levels` resolutions of `resnets` blocks each (one more in the decoder)."""
    rows = []
    for side, decodes in (("encoder", False), ("decoder", True)):
        rows += [same(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in.conv", "conv_out.conv")]
        rows += _norm(f"{side}.norm_out", f"{side}.norm_out", spatial=decodes)
        for i in range(2):
            rows += _resnet(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}", spatial=decodes)
        way = "up" if decodes else "down"
        for i in range(levels):
            # SAT counts the decoder's levels from the finest, diffusers from the coarsest
            own, other = f"{side}.{way}.{i}", f"{side}.{way}_blocks.{levels - 1 - i if decodes else i}"
            for j in range(resnets + decodes):
                rows += _resnet(f"{own}.block.{j}", f"{other}.resnets.{j}", spatial=decodes)
            rows.append(same(f"{own}.{way}sample.conv", f"{other}.{way}samplers.0.conv"))
    return rows


def _resnet(sat: str, diffusers: str, spatial: bool) -> list[LayerNames]:
    rows = [same(f"{sat}.nin_shortcut", f"{diffusers}.conv_shortcut")]
    for k in (1, 2):
        rows.append(same(f"{sat}.conv{k}.conv", f"{diffusers}.conv{k}.conv"))
        rows += _norm(f"{sat}.norm{k}", f"{diffusers}.norm{k}", spatial)
    return rows


def _norm(sat: str, diffusers: str, spatial: bool) -> list[LayerNames]:
    names = (".norm_layer", ".conv_y.conv", ".conv_b.conv") if spatial else ("",)
    return [same(sat + name, diffusers + name) for name in names]


def to_diffusers(rows: Iterable[LayerNames], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `weights`, by SAT's names, that the table has, by diffusers' names. The modulation (14 % of a 5B
    model) is copied; all else are views."""
    found: dict[str, Tensor] = {}
    for row in rows:
        for suffix in SUFFIXES:
            if (tensor := weights.get(row.sat + suffix)) is not None:
                blocks = _split(row.sat + suffix, tensor, sum(len(own) for _, own in row.parts))
                found |= {name + suffix: _joined([blocks[k] for k in own]) for name, own in row.parts}
    return found


def to_sat(rows: Iterable[LayerNames], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`, for SAT's layers whose parts are all there. What SAT stacks (q, k and v, and
    the modulation: 36 % of a 5B model) is copied."""
    found = {}
    for row in rows:
        for suffix in SUFFIXES:
            if all(name + suffix in weights for name, _ in row.parts):
                blocks: dict[int, Tensor] = {}
                for name, own in row.parts:
                    pieces = _split(name + suffix, weights[name + suffix], len(own))
                    blocks |= dict(zip(own, pieces, strict=True))
                found[row.sat + suffix] = _joined([blocks[k] for k in range(len(blocks))])
    return found


def _split(name: str, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    if count == 1:
        return (tensor,)
    if tensor.ndim == 0 or tensor.shape[0] % count:
        raise ConfigError(
            f"{name}: {list(tensor.shape)} does not divide into {count} blocks; this is another model."
        )
    return tensor.chunk(count)


def _joined(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]
