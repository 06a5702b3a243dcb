"""LoRA: SAT's `matrix_A` and `matrix_B`, peft's `lora_A` and `lora_B`, and the file that diffusers loads."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
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

    `pairs` gives A (rank, in) and B (out, rank) by diffusers' name of the layer. `alpha` is None if it is not
    known: SAT keeps it in the YAML.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    alpha: float | None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return next(iter(self.pairs.values()))[0].shape[0]


def split_sat(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """SAT's tensors without LoRA, named as if there were none, and those of LoRA."""
    own = {name: t for name, t in weights.items() if ".matrix_" in name}
    return {name.replace(".original.", "."): t for name, t in weights.items() if name not in own}, own


def from_sat(rows: Iterable[LayerNames], weights: Mapping[str, Tensor], alpha: float | None, where: str) -> Lora:
    """SAT's matrices, by the rows that can have them."""
    left = dict(weights)
    pairs = {}
    for layer, names in _sat_names(rows):
        found = {name: left.pop(name) for name in names if name in left}
        if found:
            pairs[layer] = _pair(found, names, where)
    _reject(left, where, "CogVideo's lora2 adapts attention layers only")
    return Lora(pairs, alpha)


def to_sat(rows: Iterable[LayerNames], lora: Lora, where: str) -> dict[str, Tensor]:
    """The matrices by SAT's names."""
    left = dict(lora.pairs)
    found: dict[str, Tensor] = {}
    for layer, names in _sat_names(rows):
        if layer in left:
            found |= dict(zip(names, left.pop(layer), strict=True))
    _reject(left, where, "SAT's lora2 adapts to_q, to_k, to_v and to_out.0 only")
    return found


def _sat_names(rows: Iterable[LayerNames]) -> Iterator[tuple[str, list[str]]]:
    """diffusers' layers, and SAT's names of A and B in each."""
    for row in rows:
        for layer, (block,) in row.parts:
            yield layer, [f"{row.sat}.matrix_{letter}.{block}" for letter in "AB"]


def from_peft(weights: Mapping[str, Tensor], alpha: float | None, where: str) -> Lora:
    """Matrices by peft's names, such as `<layer>.lora_A.weight`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if not (match := _MATRIX.fullmatch(name)):
            raise ConfigError(
                f"{where}: {name} is not a LoRA matrix of a linear layer; only lora_A and lora_B can be converted."
            )
        found.setdefault(match[1], {})[f"{match[1]}.lora_{match[2]}.weight"] = tensor
    return Lora(
        {k: _pair(v, [f"{k}.lora_{letter}.weight" for letter in "AB"], where) for k, v in found.items()}, alpha
    )


def _pair(found: Mapping[str, Tensor], names: list[str], where: str) -> tuple[Tensor, Tensor]:
    for name in names:
        if name not in found:
            raise ConfigError(f"{where}: {name} is missing; copy or download the file again.")
    a, b = (found[name] for name in names)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ConfigError(f"{where}: {names[0]} {list(a.shape)} and {names[1]} {list(b.shape)} do not multiply.")
    return a, b


def _reject(left: Mapping[str, Any], where: str, why: str) -> None:
    if left:
        raise ConfigError(f"{where}: {len(left)} adapters have no place (first: {next(iter(left))}); {why}.")


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
    return Lora(lora.pairs, own if alpha is None else alpha)


def write(file: Path, lora: Lora) -> None:
    """`file` as diffusers' `load_lora_weights` takes it, with rank and alpha."""
    # whole names, because peft would find a shorter one in layers that have no adapter
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.pairs)}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({_PREFIX + key: value for key, value in config.items()})}
    weights = {
        f"{_PREFIX}{name}.lora_{letter}.weight": tensor
        for name, pair in lora.pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    write_tensors(file, weights, metadata)


def alpha_of(base: Mapping[str, Any]) -> float | None:
    """SAT's `lora_alpha` in CogVideo's YAML; None if that has no LoRA."""
    model = base.get("model") or {}
    if not engine_of(model).has_sat_network:
        return None
    network = read_network(model)
    return None if network.lora_rank is None else network.lora_alpha
