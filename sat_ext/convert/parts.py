"""The parts of a model as both layouts see them: weights by diffusers' names, config.json, LoRA."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sat_ext.cogvideox import LATENT_SIDE
from sat_ext.convert.architecture import AUTOENCODER, TRANSFORMER, empty_model
from sat_ext.convert.lora import Lora
from sat_ext.convert.names import LayerNames, autoencoder_rows, sat_names, to_diffusers, transformer_rows
from sat_ext.convert.positions import UNUSED, computed
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

Layout = Literal["sat", "diffusers", "engine"]  # CogVideo's, diffusers', and that of a run of the built-in engine


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What the weights do not show: CogVideo's YAML, the size of the video, the autoencoder's scale, LoRA's alpha.

    `base_weights` is where the weights below a LoRA are; `with_base` is false to convert the LoRA alone. `to` is
    the layout to write: weights that are in it already are refused before their shapes are checked.
    """

    base: Mapping[str, Any] | None = None
    size: Bucket | None = None
    scale_factor: float | None = None
    alpha: float | None = None
    base_weights: Path | None = None
    with_base: bool = True
    to: Layout | None = None

    def reject_layout(self, layout: Layout, where: str) -> None:
        """Raise `ConfigError` where `where` is in the layout to be written."""
        if layout == self.to:
            raise ConfigError(f"--to: {where} is in the layout of {layout} already; name the other one.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A transformer or an autoencoder.

    Of a LoRA alone `weights` is empty and `config` None. `sat_only` are tensors that diffusers has no place for,
    by SAT's names without the prefix. `where` names the file in messages, `left_out` what else it holds.
    """

    where: str
    layout: Layout
    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    lora: Lora | None = None
    sat_only: dict[str, Tensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its folder in either layout."""
        is_vae = self.config is not None and self.config["_class_name"] == AUTOENCODER
        return "vae" if is_vae else "transformer"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, which must be there."""
        return next(iter(self.weights.values())).dtype


def rows_of(config: Mapping[str, Any]) -> list[LayerNames]:
    """The table of names for a model of this config.json."""
    if config["_class_name"] == TRANSFORMER:
        return transformer_rows(config["num_layers"])
    return autoencoder_rows(len(config["block_out_channels"]), config["layers_per_block"])


def from_sat_names(weights: Mapping[str, Tensor], config: dict[str, Any], where: str) -> dict[str, Tensor]:
    """`weights`, by SAT's names, as the model of `config` has them. `ConfigError` unless all are there and fit."""
    rows, shapes = rows_of(config), _shapes(config)
    _require_complete(weights, set(sat_names(rows, shapes).values()), where)
    found = to_diffusers(rows, weights)
    _require_shapes(found, shapes, where)
    return found


def checked(weights: dict[str, Tensor], config: dict[str, Any], where: str) -> dict[str, Tensor]:
    """`weights`, by diffusers' names. `ConfigError` unless they are those of the model of `config`."""
    shapes = _shapes(config)
    _require_complete(weights, set(shapes), where)
    _require_shapes(weights, shapes, where)
    return weights


def _shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}


def _require_complete(found: Collection[str], expected: set[str], where: str) -> None:
    missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
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


def _require_shapes(found: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> None:
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ConfigError(
                f"{where}: {name} is {list(found[name].shape)}, but {list(shape)} in the model that config.json "
                "or --base describes; give the YAML of these weights with --base, or --size."
            )


def take_sat_only(plain: dict[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Remove from `plain` what diffusers computes or never reads; return what cannot be computed bit for bit.

    Raises `ConfigError` where the positions are not those that diffusers will compute.
    """
    made, kept = computed(config, plain["time_embed.0.weight"].dtype), {}
    for name in sorted({*made, UNUSED, "transformer.word_embeddings.weight"} & plain.keys()):
        tensor, own = plain.pop(name), made.get(name)
        if own is not None and own.dtype == tensor.dtype and torch.equal(own, tensor):
            continue
        # 0.02: rounding, of bfloat16 too, is below it, and the positions of another size are not
        if own is not None and name != UNUSED and (own.shape != tensor.shape or _distance(own, tensor) > 0.02):
            raise ConfigError(
                f"{where}: {name} {list(tensor.shape)} is not the one for videos of {config['sample_frames']}x"
                f"{config['sample_height'] * LATENT_SIDE}x{config['sample_width'] * LATENT_SIDE}; give the YAML "
                "of these weights with --base, or --size."
            )
        kept[name] = tensor
    return kept


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())
