"""The parts of a model as both layouts see them: weights by diffusers' names, config.json, LoRA."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sat_ext.cogvideox import LATENT_SIDE, Grid, latent_frames, rotary_table, sinusoidal_table
from sat_ext.convert.architecture import TRANSFORMER, empty_model
from sat_ext.convert.lora import Lora
from sat_ext.convert.names import SUFFIXES, LayerNames, autoencoder_rows, to_diffusers, transformer_rows
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

Layout = Literal["sat", "diffusers"]
UNREAD = "transformer.position_embeddings.weight"  # SAT's own, which no network of CogVideoX reads
UNREAD_LENGTH = 64  # `max_sequence_length` of every YAML of CogVideo's


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What the weights do not show. `base` is CogVideo's YAML, `size` that of the video in pixels, `base_weights`
    where the weights below a LoRA are; without `with_base` the LoRA alone is read. `to` is the layout to write,
    with `merge` after a LoRA is merged into its base. `ema` takes averaged weights."""

    base: Mapping[str, Any] | None = None
    size: Bucket | None = None
    scale_factor: float | None = None
    alpha: float | None = None
    base_weights: Path | None = None
    with_base: bool = True
    to: Layout | None = None
    merge: bool = False
    ema: bool = False

    def reject_layout(self, layout: Layout, where: str) -> None:
        """Raise `ConfigError` if `where` is in the layout to be written, or is to have averages and cannot."""
        if layout == self.to and not self.merge:
            raise ConfigError(f"--to: {where} is in the layout of {layout} already; name the other one.")
        if self.ema and layout == "diffusers":
            raise ConfigError(
                f"--ema: {where} is no checkpoint, which alone may hold averaged weights; leave it out."
            )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A transformer or an autoencoder; of a LoRA alone `weights` may be empty, and `config` is None.

    `sat_only` are tensors that diffusers has no place for, by SAT's names without the prefix. `where` names the
    file in messages, `left_out` what else it holds."""

    where: str
    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    lora: Lora | None = None
    sat_only: dict[str, Tensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def rows_of(config: Mapping[str, Any]) -> list[LayerNames]:
    """The table of names for a model of this config.json."""
    if config["_class_name"] == TRANSFORMER:
        return transformer_rows(config["num_layers"])
    return autoencoder_rows(len(config["block_out_channels"]), config["layers_per_block"])


def checked(
    weights: Mapping[str, Tensor], config: dict[str, Any], where: str, *, layout: Layout
) -> dict[str, Tensor]:
    """`weights`, in `layout`'s names, by diffusers'. `ConfigError` unless they are those of `config`'s model."""
    shapes = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    expected, rows = set(shapes), rows_of(config)
    if layout == "sat":
        parts = [(row.sat, name) for row in rows for name, _ in row.parts]
        expected = {sat + end for sat, name in parts for end in SUFFIXES if name + end in shapes}
    missing, unknown = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing:
        raise ConfigError(
            f"{where}: {len(missing)} of {len(expected)} tensors are missing (first: {missing[0]})"
            + (f" and {len(unknown)} unknown (first: {unknown[0]})" if unknown else "")
            + "; these are weights of another model, or not all of them."
        )
    if unknown:
        raise ConfigError(
            f"{where}: {len(unknown)} tensors have no place in a CogVideoX model (first: {unknown[0]}); "
            "these are weights of another model."
        )
    found = to_diffusers(rows, weights) if layout == "sat" else dict(weights)
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ConfigError(
                f"{where}: {name} is {list(found[name].shape)}, but {list(shape)} in the model that config.json "
                "or --base describes; give the YAML of these weights with --base, or --size."
            )
    return found


def computed(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that SAT's transformer has beyond diffusers', by SAT's names, for a model of this config.json:
    the position embeddings, which CogVideo keeps in its checkpoints and diffusers computes."""
    patch, head = config["patch_size"], config["attention_head_dim"]
    hidden = config["num_attention_heads"] * head
    rows, columns = config["sample_height"] // patch, config["sample_width"] // patch
    grid = Grid(latent_frames(config["sample_frames"]), rows, columns)
    if not config["use_rotary_positional_embeddings"]:
        scale = config["spatial_interpolation_scale"]
        video = sinusoidal_table(grid, hidden, (1.0, scale, scale))
        text = torch.zeros(config["max_text_seq_length"], hidden)
        return {"mixins.pos_embed.pos_embedding": torch.cat([text, video])[None].to(dtype)}
    tensors = {UNREAD: torch.zeros(UNREAD_LENGTH, hidden, dtype=dtype)}
    if config["patch_size_t"] is None:  # 1.5 computes its tables at every start
        cosines, sines = rotary_table(grid, head)
        tensors |= {"mixins.pos_embed.freqs_sin": sines.to(dtype), "mixins.pos_embed.freqs_cos": cosines.to(dtype)}
    return tensors


def take_sat_only(plain: dict[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Remove from `plain` what diffusers computes or never reads; return what cannot be computed bit for bit.
    Raises `ConfigError` if the positions are not those that diffusers will compute."""
    made, kept = computed(config, plain["time_embed.0.weight"].dtype), {}
    for name in sorted({*made, UNREAD, "transformer.word_embeddings.weight"} & plain.keys()):
        tensor, own = plain.pop(name), made.get(name)
        if own is not None and own.dtype == tensor.dtype and torch.equal(own, tensor):
            continue
        # 0.02: positions of another size are further apart than that, and rounding, even to bfloat16, is below it
        if (
            own is not None
            and name != UNREAD
            and not (own.shape == tensor.shape and torch.allclose(own.float(), tensor.float(), rtol=0, atol=0.02))
        ):
            raise ConfigError(
                f"{where}: {name} {list(tensor.shape)} is not the one for videos of {config['sample_frames']}x"
                f"{config['sample_height'] * LATENT_SIDE}x{config['sample_width'] * LATENT_SIDE}; give the YAML "
                "of these weights with --base, or --size."
            )
        kept[name] = tensor
    return kept
