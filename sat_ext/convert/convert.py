"""The conversions of `sat-ext convert` and `sat-ext export`: parts are read, and written in the other layout."""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from sat_ext.checkpoint.layout import WEIGHTS_NAME
from sat_ext.convert import lora as adapters
from sat_ext.convert.files import aside, write_checkpoint, write_safetensors, write_tensors
from sat_ext.convert.names import adapter_rows, to_sat
from sat_ext.convert.parts import ConvertOptions, Part, computed, rows_of
from sat_ext.convert.read import (
    AUTOENCODER_FILE,
    LORA_YAML,
    PREFIX,
    SAT_ONLY_FILE,
    read_autoencoder,
    read_transformer,
)
from sat_ext.errors import ConfigError

READERS = {"transformer": read_transformer, "vae": read_autoencoder}  # by the name of their folder


@dataclass(frozen=True)
class Converted:
    """What was written, its LoRA, and what else the source held."""

    written: list[Path]
    lora: adapters.Lora | None
    left_out: tuple[str, ...]


def convert(
    source: Path, target: Path, to: Literal["diffusers", "sat"], parts: Collection[str], options: ConvertOptions
) -> Converted:
    """Write those of `parts` that `source` holds into `target`, as `transformer/`, `vae/` and the LoRA's file.

    With `options.merge` the LoRA is added to its base instead. Raises `ConfigError` if `source` holds none or is
    in the layout `to` already, if `target` lies inside a part, and for what cannot be converted exactly; then
    nothing of that part is left in `target`."""
    _reject_inside(target, source)
    found = {name: READERS[name](source, replace(options, to=to)) for name in parts}
    held = {name: part for name, part in found.items() if part is not None}
    if not held:
        raise ConfigError(
            f"{source}: holds no {' and no '.join(parts)} of CogVideoX; SAT's layout has transformer/latest and "
            "vae/3d-vae.pt, diffusers' has transformer/config.json and vae/config.json."
        )
    if options.merge:
        held["transformer"] = _merged(held.get("transformer"), source)
    written = []
    for name, part in held.items():
        folder = target / name
        written += _write_diffusers(part, folder) if to == "diffusers" else _write_sat(name, part, folder)
    lora = next((part.lora for part in held.values() if part.lora is not None), None)
    return Converted(written, lora, tuple(name for part in held.values() for name in part.left_out))


def export(source: Path, target: Path, options: ConvertOptions) -> Converted:
    """A run's LoRA as the file that diffusers loads; of one that trained all weights, the transformer's folder."""
    _reject_inside(target, source)
    part = read_transformer(source, replace(options, with_base=False))
    if part is None:
        raise ConfigError(f"{source}: holds no transformer and no LoRA; name a run's folder or a checkpoint.")
    return Converted(_write_diffusers(part, target / "transformer"), part.lora, part.left_out)


def _merged(part: Part | None, source: Path) -> Part:
    if part is None or part.lora is None:
        raise ConfigError(f"--merge: {source} holds no LoRA; leave the option out.")
    config = _known_base(part)
    weights = adapters.merge(part.weights, config, _known_scale(part.lora, part.where), part.where)
    return replace(part, weights=weights, lora=None)


def _known_base(part: Part) -> dict[str, Any]:
    if part.config is None:
        raise ConfigError(
            f"{part.where}: holds a LoRA and not the weights that it belongs to; name their folder with "
            "--base-weights."
        )
    return part.config


def _known_scale(lora: adapters.Lora, where: str) -> adapters.Lora:
    if lora.alpha is None:
        raise ConfigError(
            f"{where}: SAT keeps the scale of a LoRA in the YAML; give CogVideo's YAML of the run with --base, or "
            "its lora_alpha with --alpha."
        )
    return lora


def _reject_inside(target: Path, source: Path) -> None:
    """A `transformer/` inside a part would be read in its place from then on."""
    parts = [source / name for name in READERS if (source / name).is_dir()]
    own = source.parent.parent if source.is_file() else source
    inside = [part for part in parts if target.resolve().is_relative_to(part.resolve())]
    if any((own / name).is_file() for name in ("latest", "config.json")) and target.resolve() == own.resolve():
        inside.append(own)  # a part itself, or a run
    if inside:
        raise ConfigError(
            f"-o: {target} is a part of the source, or lies in one ({inside[0]}); name another folder."
        )


def _write_diffusers(part: Part, folder: Path) -> list[Path]:
    """The model's folder and its LoRA's file beside it, as far as there are any."""
    written = []
    if part.weights and part.config is not None:
        with aside(folder) as draft:
            draft.mkdir()
            write_safetensors(draft, part.weights, str(folder))
            _write_json(draft / "config.json", part.config)
            if part.sat_only:  # kept, although diffusers has no place for it: the way back gives the same file
                write_tensors(draft / SAT_ONLY_FILE, part.sat_only)
        written.append(folder)
    if part.lora is not None:
        lora = _known_scale(part.lora, part.where)
        with aside(folder.parent / adapters.FILE) as draft:
            adapters.write(draft, lora)
        written.append(folder.parent / adapters.FILE)
    return written


def _write_sat(name: str, part: Part, folder: Path) -> list[Path]:
    """A folder as CogVideo reads it: of the autoencoder `3d-vae.pt`, which its `ckpt_path` names, of the
    transformer `latest` and iteration 1 for SAT's load_checkpoint. A LoRA is in the same file as the base weights,
    as in CogVideo's own; `lora.yaml` is what its YAML must say."""
    config = _known_base(part)
    weights, texts = to_sat(rows_of(config), part.weights), dict[str, str]()
    file, section, prefix = AUTOENCODER_FILE, "state_dict", ""
    if name == "transformer":
        file, section, prefix, texts["latest"] = f"1/{WEIGHTS_NAME}", "module", PREFIX, "1"
        weights |= computed(config, next(iter(part.weights.values())).dtype)
    weights |= part.sat_only
    if part.lora is not None:
        matrices = adapters.to_sat(adapter_rows(config["num_layers"]), part.lora, part.where)
        adapted = {name.partition(".matrix_")[0] for name in matrices}
        weights = {_original(name, adapted): tensor for name, tensor in weights.items()} | matrices
        params = {"r": part.lora.rank, "lora_alpha": part.lora.sat_alpha}
        mixin = {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}
        yaml_of_it = {"model": {"network_config": {"params": {"modules": {"lora_config": mixin}}}}}
        texts[LORA_YAML] = yaml.safe_dump(yaml_of_it, sort_keys=False)
    with aside(folder) as draft:
        (draft / file).parent.mkdir(parents=True)
        named = {prefix + name: tensor for name, tensor in weights.items()}
        write_checkpoint(draft / file, section, named, str(folder))
        _write_json(draft / "config.json", config)
        for name, text in texts.items():
            (draft / name).write_text(text)
    return [folder]


def _original(name: str, adapted: Collection[str]) -> str:
    """lora2 puts the layer that it adapts under `original`."""
    layer, _, last = name.rpartition(".")
    return f"{layer}.original.{last}" if layer in adapted else name


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
