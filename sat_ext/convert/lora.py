"""LoRA: SAT's `matrix_A` and `matrix_B`, peft's `lora_A` and `lora_B`, the file that diffusers loads, and weights
with a LoRA merged into them."""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from torch import Tensor

from sat_ext.cogvideo.network import read_network
from sat_ext.convert.architecture import empty_model
from sat_ext.convert.files import read_tensors, write_tensors
from sat_ext.convert.names import LayerNames
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError

FILE = LORA_WEIGHT_NAME_SAFE
_PREFIX = "transformer."
_MATRIX = re.compile(r"(.+\.lora_[AB])(?:\.default)?\.weight")  # with peft's adapter name or without
_NORMS = re.compile(r"(.+\.lora_magnitude_vector)(?:\.default\.weight)?")


@dataclass(frozen=True)
class Lora:
    """Adapters: each layer's output gains `alpha` / rank * B @ A @ input, with `rslora` `alpha` / sqrt(rank).

    `weights` are A (rank, in) and B (out, rank) of each layer, by peft's names (`<layer>.lora_A.weight`) and
    diffusers' name of the layer; with DoRA also the norm of each of its rows (`<layer>.lora_magnitude_vector`).
    `alpha` is None if it is not known: SAT keeps it in the YAML."""

    weights: dict[str, Tensor]
    alpha: float | None
    rslora: bool = False

    @property
    def rank(self) -> int:
        """Rows of A."""
        return next(t for name, t in self.weights.items() if ".lora_A." in name).shape[0]

    @property
    def dora(self) -> bool:
        """Whether its layers have norms of their own."""
        return any(map(_NORMS.fullmatch, self.weights))

    @property
    def sat_alpha(self) -> float | None:
        """The alpha that gives the same scale over the rank."""
        return self.alpha * math.sqrt(self.rank) if self.rslora and self.alpha is not None else self.alpha

    @property
    def layers(self) -> list[str]:
        """The layers that it adapts."""
        return sorted({name.rpartition(".lora_")[0] for name in self.weights})

    @property
    def config(self) -> dict[str, Any]:
        """As peft's `LoraConfig` has it."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": self.layers,  # whole names: peft would find a shorter one in other layers too
            "use_rslora": self.rslora,
            "use_dora": self.dora,
        }


def from_sat(rows: Iterable[LayerNames], weights: Mapping[str, Tensor], alpha: float | None, where: str) -> Lora:
    """SAT's matrices, by the rows that can have them."""
    names = _sat_names(rows)
    _reject(weights.keys() - names.values(), where, "CogVideo's lora2 adapts attention layers only")
    found = {name: weights[sat] for name, sat in names.items() if sat in weights}
    _require_pairs(found, names, where)
    return Lora(found, alpha)


def to_sat(rows: Iterable[LayerNames], lora: Lora, where: str) -> dict[str, Tensor]:
    """The matrices by SAT's names."""
    names, remedy = _sat_names(rows), "add it to the weights with --merge"
    if lora.dora:
        raise ConfigError(f"{where}: SAT's lora2 has no DoRA, with which this LoRA was trained; {remedy}.")
    only = "SAT's lora2 adapts to_q, to_k, to_v and to_out.0 only"
    _reject(lora.weights.keys() - names, where, f"{only}; {remedy}")
    # SAT samples from no file that lacks one of lora2's matrices; all are alike, as attention layers are square
    zeros = {k: torch.zeros_like(next(t for n, t in lora.weights.items() if f".lora_{k}." in n)) for k in "AB"}
    return {sat: lora.weights.get(name, zeros[name[-len("A.weight")]]) for name, sat in names.items()}


def _sat_names(rows: Iterable[LayerNames]) -> dict[str, str]:
    """SAT's name of each matrix by that of `Lora`."""
    return {
        f"{layer}.lora_{letter}.weight": f"{row.sat}.matrix_{letter}.{block}"
        for row in rows
        for layer, (block,) in row.parts
        for letter in "AB"
    }


def _reject(left: Collection[str], where: str, why: str) -> None:
    if left:
        raise ConfigError(f"{where}: {len(left)} LoRA matrices have no place (first: {min(left)}); {why}.")


def from_peft(weights: Mapping[str, Tensor], alpha: float | None, where: str, *, rslora: bool = False) -> Lora:
    """Matrices and norms by peft's names."""
    found = {}
    for name, tensor in weights.items():
        if match := _MATRIX.fullmatch(name):
            found[f"{match[1]}.weight"] = tensor
        elif match := _NORMS.fullmatch(name):
            found[match[1]] = tensor
        else:
            raise ConfigError(
                f"{where}: {name} is not of a LoRA or DoRA; only lora_A, lora_B and lora_magnitude_vector can be "
                "converted."
            )
    _require_pairs(found, {}, where)
    return Lora(found, alpha, rslora)


def _require_pairs(found: Mapping[str, Tensor], names: Mapping[str, str], where: str) -> None:
    """Raise `ConfigError` unless each layer has an A and a B that multiply, all of one rank, and with DoRA norms.
    `names`: what `where` calls them."""
    norms = [".lora_magnitude_vector"] if any(map(_NORMS.fullmatch, found)) else []
    ranks: dict[int, str] = {}
    for layer in dict.fromkeys(name.rpartition(".lora_")[0] for name in found):
        own = [layer + end for end in (".lora_A.weight", ".lora_B.weight", *norms)]
        shown = [names.get(name, name) for name in own]
        for name, other in zip(own, shown, strict=True):
            if name not in found:
                raise ConfigError(f"{where}: {other} is missing; copy or download the file again.")
        a, b = (found[name].shape for name in own[:2])
        if len(a) != len(b) or len(a) not in (2, 4) or a[0] != b[1]:  # 4: of a convolution
            raise ConfigError(f"{where}: {shown[0]} {list(a)} and {shown[1]} {list(b)} do not multiply.")
        ranks[a[0]] = shown[0]
    if len(ranks) > 1:
        several = ", ".join(f"{rank} of {name}" for rank, name in ranks.items())
        raise ConfigError(f"{where}: its layers have several ranks ({several}); only one can be converted.")


def read(file: Path, alpha: float | None) -> Lora:
    """diffusers' file; without `alpha`, with the file's own or, as diffusers does if there is none, the rank."""
    weights = read_tensors(file)
    other = next((n for n in weights if not n.startswith(_PREFIX)), None if weights else "nothing")
    if other is not None:
        raise ConfigError(f"{file}: holds {other}, not a transformer's LoRA; name the file of a CogVideoX LoRA.")
    lora = from_peft({name.removeprefix(_PREFIX): t for name, t in weights.items()}, alpha, str(file))
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY) or "{}"
    try:
        metadata = {key.removeprefix(_PREFIX): value for key, value in json.loads(text).items()}
        own = float(metadata.get("lora_alpha", lora.rank))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}: its {LORA_ADAPTER_METADATA_KEY} is {text[:40]!r}, not what diffusers writes ({error}); copy "
            "or download it again."
        ) from error
    if metadata.get("alpha_pattern"):
        raise ConfigError(
            f"{file}: its layers have scales of their own, which SAT's LoRA does not support; use another."
        )
    return Lora(lora.weights, own if alpha is None else alpha, bool(metadata.get("use_rslora")))


def write(file: Path, lora: Lora) -> None:
    """`file` as diffusers' `load_lora_weights` takes it, with what `LoraConfig` says of it."""
    config = {_PREFIX + key: value for key, value in lora.config.items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(config)}
    write_tensors(file, {_PREFIX + name: tensor for name, tensor in lora.weights.items()}, metadata)


def merge(weights: Mapping[str, Tensor], config: Mapping[str, Any], lora: Lora, where: str) -> dict[str, Tensor]:
    """The weights of `config`'s model, by diffusers' names, that compute what `weights` do with the LoRA."""
    for layer in lora.layers:
        a, b = (lora.weights[f"{layer}.lora_{letter}.weight"].shape for letter in "AB")
        own = weights.get(f"{layer}.weight")
        if own is None or own.shape != (b[0], *a[1:]):
            raise ConfigError(
                f"{where}: its LoRA is for a {layer} of {[b[0], *a[1:]]}, and the base has "
                f"{'none' if own is None else list(own.shape)}; name its own base with --base-weights."
            )
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    model.load_lora_adapter(dict(lora.weights), prefix=None, metadata=lora.config)
    try:
        model.fuse_lora(safe_fusing=True)  # into copies, as the weights are mapped from a file
    except ValueError as error:  # NaN
        raise ConfigError(f"{where}: its LoRA holds no numbers ({error}); take an earlier checkpoint.") from error
    model.unload_lora()
    return {**weights, **{f"{n}.weight": model.get_submodule(n).weight.detach() for n in lora.layers}}


def alpha_of(base: Mapping[str, Any]) -> float | None:
    """SAT's `lora_alpha` in CogVideo's YAML; None if that has no LoRA."""
    model = base.get("model") or {}
    if not engine_of(model).is_cogvideo:
        return None
    network = read_network(model)
    return None if network.lora_rank is None else network.lora_alpha
