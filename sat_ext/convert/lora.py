"""LoRA: SAT's `matrix_A` and `matrix_B`, peft's `lora_A` and `lora_B`, and the file that diffusers loads."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from torch import Tensor

from sat_ext.cogvideo.network import read_network
from sat_ext.convert.files import read_tensors, write_tensors
from sat_ext.convert.names import LayerNames
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError

FILE = LORA_WEIGHT_NAME_SAFE
_PREFIX = "transformer."
_MATRIX = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")  # with peft's adapter name or without


@dataclass(frozen=True)
class Lora:
    """Adapters: each layer's output gains `alpha` / rank * B @ A @ input.

    `weights` are A (rank, in) and B (out, rank) of each layer, by peft's names (`<layer>.lora_A.weight`) and
    diffusers' name of the layer. `alpha` is None if it is not known: SAT keeps it in the YAML.
    """

    weights: dict[str, Tensor]
    alpha: float | None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return next(t for name, t in self.weights.items() if ".lora_A." in name).shape[0]


def from_sat(rows: Iterable[LayerNames], weights: Mapping[str, Tensor], alpha: float | None, where: str) -> Lora:
    """SAT's matrices, by the rows that can have them."""
    names = _sat_names(rows)
    _reject(weights.keys() - names.values(), where, "CogVideo's lora2 adapts attention layers only")
    found = {name: weights[sat] for name, sat in names.items() if sat in weights}
    _require_pairs(found, names, where)
    return Lora(found, alpha)


def to_sat(rows: Iterable[LayerNames], lora: Lora, where: str) -> dict[str, Tensor]:
    """The matrices by SAT's names."""
    names = _sat_names(rows)
    _reject(lora.weights.keys() - names, where, "SAT's lora2 adapts to_q, to_k, to_v and to_out.0 only")
    return {names[name]: tensor for name, tensor in lora.weights.items()}


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


def from_peft(weights: Mapping[str, Tensor], alpha: float | None, where: str) -> Lora:
    """Matrices by peft's names."""
    found = {}
    for name, tensor in weights.items():
        if not (match := _MATRIX.fullmatch(name)):
            raise ConfigError(
                f"{where}: {name} is not a LoRA matrix of a linear layer; only lora_A and lora_B can be converted."
            )
        found[f"{match[1]}.lora_{match[2]}.weight"] = tensor
    _require_pairs(found, {}, where)
    return Lora(found, alpha)


def _require_pairs(found: Mapping[str, Tensor], names: Mapping[str, str], where: str) -> None:
    """Raise `ConfigError` unless each layer has an A and a B that multiply. `names`: what `where` calls them."""
    for layer in dict.fromkeys(name.rpartition(".lora_")[0] for name in found):
        pair = [f"{layer}.lora_{letter}.weight" for letter in "AB"]
        shown = [names.get(name, name) for name in pair]
        for name, other in zip(pair, shown, strict=True):
            if name not in found:
                raise ConfigError(f"{where}: {other} is missing; copy or download the file again.")
        a, b = (found[name].shape for name in pair)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ConfigError(f"{where}: {shown[0]} {list(a)} and {shown[1]} {list(b)} do not multiply.")


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
    if metadata.get("use_rslora") or metadata.get("alpha_pattern"):
        raise ConfigError(
            f"{file}: its layers have scales of their own, which SAT's LoRA does not support; use another."
        )
    return Lora(lora.weights, own if alpha is None else alpha)


def write(file: Path, lora: Lora) -> None:
    """`file` as diffusers' `load_lora_weights` takes it, with rank and alpha."""
    # whole names, because peft would find a shorter one in layers that have no adapter
    layers = sorted({name.rpartition(".lora_")[0] for name in lora.weights})
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": layers}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({_PREFIX + key: value for key, value in config.items()})}
    write_tensors(file, {_PREFIX + name: tensor for name, tensor in lora.weights.items()}, metadata)


def alpha_of(base: Mapping[str, Any]) -> float | None:
    """SAT's `lora_alpha` in CogVideo's YAML; None if that has no LoRA."""
    model = base.get("model") or {}
    if not engine_of(model).is_cogvideo:
        return None
    network = read_network(model)
    return None if network.lora_rank is None else network.lora_alpha
