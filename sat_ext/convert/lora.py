"""LoRA: SAT's `matrix_A` and `matrix_B`, peft's `lora_A` and `lora_B`, and the file that diffusers loads."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from sat_ext.cogvideo.network import read_network
from sat_ext.config import convert
from sat_ext.convert.files import read_metadata, read_tensors, write_tensors
from sat_ext.convert.names import LayerNames
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError

FILE = LORA_WEIGHT_NAME_SAFE
_PREFIX = "transformer."
_PAIR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Lora:
    """Adapters: each layer's output gains `alpha` / rank * B @ A @ input.

    `pairs` gives A (rank, in) and B (out, rank) by diffusers' name of the layer. `alpha` is None where it is not
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
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for row in rows:
        for layer, (block,) in row.parts:
            names = [f"{row.sat}.matrix_{letter}.{block}" for letter in "AB"]
            found = [left.pop(name, None) for name in names]
            pairs |= _pair(layer, found, names, where)
    _reject(left, where, "CogVideo's lora2 adapts attention layers only")
    return Lora(pairs, alpha)


def to_sat(rows: Iterable[LayerNames], lora: Lora, where: str) -> tuple[dict[str, Tensor], set[str]]:
    """The matrices by SAT's names, and the layers of SAT's that they adapt."""
    left, adapted = dict(lora.pairs), set()
    found: dict[str, Tensor] = {}
    for row in rows:
        for layer, (block,) in row.parts:
            if layer in left:
                a, b = left.pop(layer)
                found |= {f"{row.sat}.matrix_A.{block}": a, f"{row.sat}.matrix_B.{block}": b}
                adapted.add(row.sat)
    _reject(left, where, "SAT's lora2 adapts to_q, to_k, to_v and to_out.0 only")
    return found, adapted


def from_peft(weights: Mapping[str, Tensor], alpha: float | None, where: str) -> Lora:
    """Names `<layer>.lora_A.weight`, with peft's adapter name or without."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if not (match := _PAIR.fullmatch(name)):
            raise ConfigError(
                f"{where}: {name} is not a LoRA matrix of a linear layer; only lora_A and lora_B can be converted."
            )
        halves.setdefault(match.group(1), {})[match.group(2)] = tensor
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, half in halves.items():
        names = [f"{layer}.lora_{letter}.weight" for letter in "AB"]
        pairs |= _pair(layer, [half.get("A"), half.get("B")], names, where)
    return Lora(pairs, alpha)


def read(file: Path, alpha: float | None) -> Lora:
    """diffusers' file; `alpha` is the file's own unless given, and the rank where the file has none, as there."""
    weights = read_tensors(file)
    if not weights or any(not name.startswith(_PREFIX) for name in weights):
        other = next((n for n in weights if not n.startswith(_PREFIX)), "nothing")
        raise ConfigError(f"{file}: holds {other}, not a transformer's LoRA; name the file of a CogVideoX LoRA.")
    lora = from_peft({name.removeprefix(_PREFIX): t for name, t in weights.items()}, alpha, str(file))
    metadata = _metadata(file)
    if metadata.get(f"{_PREFIX}use_rslora") or metadata.get(f"{_PREFIX}alpha_pattern"):
        raise ConfigError(
            f"{file}: its layers have scales of their own, which SAT's LoRA does not support; use another."
        )
    own = metadata.get(f"{_PREFIX}lora_alpha", lora.rank)
    if isinstance(own, bool) or not isinstance(own, int | float):
        raise ConfigError(
            f"{file}: {_PREFIX}lora_alpha of its {LORA_ADAPTER_METADATA_KEY} is {own!r}, not a number; copy or "
            "download it again."
        )
    return Lora(lora.pairs, float(own) if alpha is None else alpha)


def _metadata(file: Path) -> dict[str, Any]:
    """What diffusers wrote beside the tensors of a LoRA; empty where there is nothing."""
    text = read_metadata(file).get(LORA_ADAPTER_METADATA_KEY) or "{}"
    try:
        metadata = json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise ConfigError(
            f"{file}: its {LORA_ADAPTER_METADATA_KEY} is {text[:40]!r}, not a JSON object; copy or download it "
            "again."
        )
    return metadata


def write(file: Path, lora: Lora) -> None:
    """`file` as diffusers' `load_lora_weights` takes it, with rank and alpha."""
    assert lora.alpha is not None
    # the whole names, as peft would find a shorter one in layers that have no adapter
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.pairs)}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({_PREFIX + key: value for key, value in config.items()})}
    weights = {
        f"{_PREFIX}{name}.lora_{letter}.weight": tensor
        for name, pair in lora.pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    write_tensors(file, weights, metadata)


def yaml_section(lora: Lora) -> dict[str, Any]:
    """What CogVideo's YAML must say for its network to have these adapters."""
    config = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": lora.rank, "lora_alpha": lora.alpha}}
    return {"model": {"network_config": {"params": {"modules": {"lora_config": config}}}}}


def alpha_of(base: Mapping[str, Any]) -> float | None:
    """SAT's `lora_alpha` in CogVideo's YAML; None where that has no LoRA."""
    model = base.get("model")
    if not engine_of(model).has_sat_network:
        return None
    network = read_network(model or {})
    if network.lora_rank is None:
        return None
    return float(convert(float, network.lora_alpha, "lora_config.params.lora_alpha"))


def _pair(
    layer: str, found: list[Tensor | None], names: list[str], where: str
) -> dict[str, tuple[Tensor, Tensor]]:
    a, b = found
    if a is None and b is None:
        return {}
    if a is None or b is None:
        raise ConfigError(f"{where}: {names[a is not None]} is missing; copy or download the file again.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ConfigError(f"{where}: {names[0]} {list(a.shape)} and {names[1]} {list(b.shape)} do not multiply.")
    return {layer: (a, b)}


def _reject(left: Mapping[str, Any], where: str, why: str) -> None:
    if left:
        raise ConfigError(f"{where}: {len(left)} adapters have no place (first: {next(iter(left))}); {why}.")
