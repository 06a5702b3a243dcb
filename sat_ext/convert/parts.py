"""The parts of a model as both layouts see them: weights by diffusers' names, config.json, LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sat_ext.cogvideox import LATENT_SIDE
from sat_ext.convert.architecture import Model, count, empty_model
from sat_ext.convert.lora import Lora
from sat_ext.convert.names import LayerNames, autoencoder_rows, sat_names, to_diffusers, transformer_rows
from sat_ext.convert.positions import UNUSED, computed
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

Layout = Literal["sat", "diffusers", "engine"]  # CogVideo's, diffusers', and that of a run of the built-in engine


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the weights do not show: CogVideo's YAML, the size of the video, the autoencoder's scale, LoRA's alpha.

    `base_weights` is where the weights are that a LoRA belongs to; `with_base` is false where it is wanted alone.
    `to` is the layout to be written: what is in it already is refused before its shapes are looked at.
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

    `weights` is empty where there is a LoRA alone; then `config` is None. `sat_only` are tensors that
    diffusers has no place for, by SAT's names without the prefix. `where` names the file in messages.
    """

    where: str
    layout: Layout
    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    lora: Lora | None = None
    sat_only: dict[str, Tensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # of the file: names' beginnings that are not this part's

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, which must be there."""
        return next(iter(self.weights.values())).dtype


def rows_of(config: Mapping[str, Any]) -> list[LayerNames]:
    """The table of names for a model of this config.json."""
    if config["_class_name"] == "CogVideoXTransformer3DModel":
        return transformer_rows(config["num_layers"])
    return autoencoder_rows(len(config["block_out_channels"]), config["layers_per_block"])


def adapted_layers(lora: Lora) -> int:
    """How many layers a transformer has at least, to have these adapters."""
    return count(lora.pairs, r"transformer_blocks\.(\d+)\.")


def from_sat_names(weights: Mapping[str, Tensor], config: dict[str, Any], where: str) -> dict[str, Tensor]:
    """`weights`, by SAT's names, as the model of `config` has them. `ConfigError` unless all are there and fit."""
    model, rows = empty_model(config), rows_of(config)
    expected = sat_names(rows, model.state_dict())
    _complete(weights, set(expected.values()), where)
    found = to_diffusers(rows, weights)
    _fitting(found, model, where)
    return found


def checked(weights: Mapping[str, Tensor], config: dict[str, Any], where: str) -> dict[str, Tensor]:
    """`weights`, by diffusers' names. `ConfigError` unless they are those of the model of `config`."""
    model = empty_model(config)
    _complete(weights, set(model.state_dict()), where)
    _fitting(weights, model, where)
    return dict(weights)


def _complete(found: Collection[str], expected: set[str], where: str) -> None:
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


def _fitting(found: Mapping[str, Tensor], model: Model, where: str) -> None:
    for name, tensor in model.state_dict().items():
        if found[name].shape != tensor.shape:
            raise ConfigError(
                f"{where}: {name} is {list(found[name].shape)}, but {list(tensor.shape)} in the model that "
                "config.json or --base describes; give the YAML of these weights with --base, or --size."
            )


def take_sat_only(plain: dict[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Take out of `plain` what diffusers computes or never reads; give back what cannot be made again bit for bit.

    Raises `ConfigError` where the positions are not those that diffusers will compute.
    """
    dtype = plain["time_embed.0.weight"].dtype
    made, kept = computed(config, dtype), {}
    for name in sorted({*made, UNUSED, "transformer.word_embeddings.weight"} & plain.keys()):
        tensor, own = plain.pop(name), made.get(name)
        if own is None or name == UNUSED:
            alike = own is not None and _same(own, tensor)
        elif own.shape != tensor.shape or (own.float() - tensor.float()).abs().max() > 0.02:
            raise ConfigError(
                f"{where}: {name} {list(tensor.shape)} is not the one for videos of {config['sample_frames']}x"
                f"{config['sample_height'] * LATENT_SIDE}x{config['sample_width'] * LATENT_SIDE}; give the YAML "
                "of these weights with --base, or --size."
            )
        else:
            alike = _same(own, tensor)
        if not alike:
            kept[name] = tensor
    return kept


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
