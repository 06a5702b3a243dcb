"""Parts -> folders in either layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from sat_ext.checkpoint.layout import WEIGHTS_NAME
from sat_ext.convert import lora as adapters
from sat_ext.convert.files import Advance, aside, write_checkpoint, write_safetensors, write_tensors
from sat_ext.convert.names import adapter_rows, to_sat
from sat_ext.convert.parts import Part, rows_of
from sat_ext.convert.positions import computed
from sat_ext.convert.read import AUTOENCODER_FILE, LORA_YAML, PREFIX, SAT_ONLY_FILE
from sat_ext.errors import ConfigError

Tracking = Callable[[str, int], Advance]  # a file's name and size in bytes -> a bar of progress


def write_diffusers(part: Part, folder: Path, tracking: Tracking) -> list[Path]:
    """Write the model's folder `folder` and its LoRA's file beside it; return which of them there were.

    What diffusers has no place for is kept in the folder, so that the way back gives the same file.
    """
    written = []
    if part.weights and part.config is not None:
        with aside(folder) as draft:
            draft.mkdir()
            write_safetensors(draft, part.weights, tracking(str(folder), _size(part.weights)))
            _write_json(draft / "config.json", part.config)
            if part.sat_only:
                write_tensors(draft / SAT_ONLY_FILE, part.sat_only)
        written.append(folder)
    if part.lora is not None:
        if part.lora.alpha is None:
            raise ConfigError(
                f"{part.where}: SAT keeps the scale of a LoRA in the YAML; give CogVideo's YAML of the run with "
                "--base, or its lora_alpha with --alpha."
            )
        with aside(folder.parent / adapters.FILE) as draft:
            adapters.write(draft, part.lora)
        written.append(folder.parent / adapters.FILE)
    return written


def write_sat_transformer(part: Part, folder: Path, tracking: Tracking) -> list[Path]:
    """`folder` as SAT's load_checkpoint reads it: `latest`, and iteration 1.

    A LoRA's matrices stand in the same file as the base weights, as in CogVideo's own; `lora.yaml` is what its
    YAML must say for them.
    """
    if part.config is None:
        raise ConfigError(
            f"{part.where}: holds a LoRA and not the weights that it belongs to; name their folder with "
            "--base-weights."
        )
    weights = to_sat(rows_of(part.config), part.weights)
    weights |= {**computed(part.config, part.dtype), **part.sat_only}
    if part.lora is not None:
        matrices, adapted = adapters.to_sat(adapter_rows(part.config["num_layers"]), part.lora, part.where)
        weights = {_original(name, adapted): tensor for name, tensor in weights.items()} | matrices
    with aside(folder) as draft:
        (draft / "1").mkdir(parents=True)
        named = {PREFIX + name: tensor for name, tensor in weights.items()}
        write_checkpoint(draft / "1" / WEIGHTS_NAME, "module", named, tracking(str(folder), _size(named)))
        (draft / "latest").write_text("1")
        _write_json(draft / "config.json", part.config)
        if part.lora is not None:
            (draft / LORA_YAML).write_text(yaml.safe_dump(adapters.yaml_section(part.lora), sort_keys=False))
    return [folder]


def write_sat_autoencoder(part: Part, folder: Path, tracking: Tracking) -> list[Path]:
    """`folder` with `3d-vae.pt`, which CogVideo's `ckpt_path` names."""
    assert part.config is not None
    weights = to_sat(rows_of(part.config), part.weights) | part.sat_only
    with aside(folder) as draft:
        draft.mkdir()
        write_checkpoint(draft / AUTOENCODER_FILE, "state_dict", weights, tracking(str(folder), _size(weights)))
        _write_json(draft / "config.json", part.config)
    return [folder]


def _original(name: str, adapted: set[str]) -> str:
    """lora2 puts the layer that it adapts under `original`."""
    layer, _, last = name.rpartition(".")
    return f"{layer}.original.{last}" if layer in adapted else name


def _size(weights: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
