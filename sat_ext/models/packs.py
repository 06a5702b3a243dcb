"""The transformer over a pack: groups of samples of different shapes, block by block.

A block's linear layers see the tokens of all groups as one sequence, so that its weights are fetched, gathered or
dequantized once. Attention runs group by group: all samples of a group have one length, so it needs no mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel
from torch import Tensor
from torch.nn import functional

Rotary = tuple[Tensor, Tensor]  # cosines and sines


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples of one shape: `latents` (B, T, C, H, W), `text` (B, L, E), `timesteps` (B,), and the rotary
    embedding of the video's positions, where the model has one."""

    latents: Tensor
    text: Tensor
    timesteps: Tensor
    rotary: Rotary | None


class PackedTransformer(CogVideoXTransformer3DModel):
    """diffusers' CogVideoX transformer, the same weights, for several groups at once."""

    def forward(self, groups: Sequence[Group], ofs: float | None = None) -> list[Tensor]:
        """What it predicts for each group, of its latents' shape. `ofs` is what 1.5's I2V model takes."""
        emb = self.time_embedding(self.time_proj(torch.cat([g.timesteps for g in groups])).to(self.dtype))
        if self.ofs_embedding is not None and self.ofs_proj is not None:
            emb = emb + self.ofs_embedding(self.ofs_proj(emb.new_full((1,), ofs)).to(self.dtype))
        states: Sequence[Tensor] = []
        for group in groups:
            tokens = self.embedding_dropout(self.patch_embed(group.text, group.latents))
            text = group.text.shape[1]
            states = [*states, tokens[:, :text], tokens[:, text:]]
        rotary = [group.rotary for group in groups]
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                states = self._gradient_checkpointing_func(block, rotary, emb, *states)
            else:
                states = block(rotary, emb, *states)
        shift, scale = self.norm_out.linear(self.norm_out.silu(emb))[:, None].chunk(2, dim=2)
        sizes = [len(group.timesteps) for group in groups]
        videos = [
            self.norm_out.norm(self.norm_final(video)) * (1 + by) + to
            for video, by, to in zip(states[1::2], scale.split(sizes), shift.split(sizes), strict=True)
        ]
        patches = self.proj_out(torch.cat([video.flatten(0, 1) for video in videos]))
        parts = patches.split([video.shape[0] * video.shape[1] for video in videos])
        return [self._unpatch(part, group.latents) for part, group in zip(parts, groups, strict=True)]

    def _unpatch(self, patches: Tensor, like: Tensor) -> Tensor:
        """The latents of patches (B * tokens, values), of the shape of `like` but for the channels."""
        batch, frames, _, height, width = like.shape
        config: Any = self.config
        side, depth = config.patch_size, config.patch_size_t or 1
        cells = patches.view(batch, frames // depth, height // side, width // side, -1, depth, side, side)
        return cells.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, -1, height, width)


class PackedBlock(CogVideoXBlock):
    """A block of it. `states` are text (B, L, D) and video (B, N, D) of each group in turn, in and out."""

    def forward(  # type: ignore[override]
        self, rotary: Sequence[Rotary | None], emb: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """`emb` is (samples of all groups, E), and modulates the norms."""
        normed, gates = _modulate(self.norm1, emb, states)
        states = _add(states, gates, _attend(self.attn1, normed, rotary))
        normed, gates = _modulate(self.norm2, emb, states)
        return _add(states, gates, self.ff(_join(normed)))


def pack_blocks(transformer: CogVideoXTransformer3DModel) -> PackedTransformer:
    """`transformer` itself, which from now on takes packs; its weights and their names stay."""
    transformer.__class__ = PackedTransformer
    for block in transformer.transformer_blocks:
        block.__class__ = PackedBlock
    assert isinstance(transformer, PackedTransformer)
    return transformer


def _modulate(norm: Any, emb: Tensor, states: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The states normed, scaled and shifted, and for each the gate (B, 1, D) of what is added to it."""
    sizes = [len(text) for text in states[::2]]
    factors = norm.linear(norm.silu(emb))[:, None].split(sizes)
    normed, gates = [], []
    for text, video, of_group in zip(states[::2], states[1::2], factors, strict=True):
        shift, scale, gate, text_shift, text_scale, text_gate = of_group.chunk(6, dim=2)
        normed += [norm.norm(text) * (1 + text_scale) + text_shift, norm.norm(video) * (1 + scale) + shift]
        gates += [text_gate, gate]
    return normed, gates


def _attend(attn: Any, states: Sequence[Tensor], rotary: Sequence[Rotary | None]) -> Tensor:
    """Each sample attends to itself: (1, tokens of all groups, D)."""
    tokens = _join(states)
    query, key, value = (to(tokens).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        query, key = attn.norm_q(query), attn.norm_k(key)
    attended = []
    for q, k, v, text, embedding in zip(
        _split(query, states), _split(key, states), _split(value, states), states[::2], rotary, strict=True
    ):
        if embedding is not None:
            q, k = (_rotate(x, text.shape[1], embedding) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        heads = functional.scaled_dot_product_attention(q, k, v)
        attended.append(heads.transpose(1, 2).flatten(2).flatten(0, 1))
    out, dropout = attn.to_out
    return dropout(out(torch.cat(attended)[None]))


def _rotate(x: Tensor, text: int, rotary: Rotary) -> Tensor:
    """Queries or keys (B, text + video tokens, heads, D), the video's turned by their positions."""
    turned: Any = apply_rotary_emb(x[:, text:], rotary, sequence_dim=1)  # type: ignore[arg-type]
    return torch.cat([x[:, :text], turned], dim=1)


def _join(states: Sequence[Tensor]) -> Tensor:
    """All tokens as one sequence (1, tokens, D): of each sample the text, then the video."""
    samples = (zip(text, video, strict=True) for text, video in zip(states[::2], states[1::2]))
    return torch.cat([tokens for group in samples for sample in group for tokens in sample])[None]


def _split(joined: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
    """The tokens (B, text + video, ...) of each group of `joined` (1, tokens, ...)."""
    shapes = [(len(text), text.shape[1] + video.shape[1]) for text, video in zip(states[::2], states[1::2])]
    parts = joined[0].split([samples * length for samples, length in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes)]


def _add(states: Sequence[Tensor], gates: Sequence[Tensor], joined: Tensor) -> tuple[Tensor, ...]:
    """The states plus what a layer made of their tokens, through the gates."""
    lengths = [(text.shape[1], video.shape[1]) for text, video in zip(states[::2], states[1::2])]
    made = [part for of, length in zip(_split(joined, states), lengths) for part in of.split(length, dim=1)]
    return tuple(state + gate * part for state, gate, part in zip(states, gates, made, strict=True))
