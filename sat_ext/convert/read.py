"""Folders and files of weights -> the parts that they hold."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sat_ext.checkpoint.layout import CONFIG_NAME, WEIGHTS_NAME, find_run, find_weights
from sat_ext.checkpoint.manifest import read_base
from sat_ext.checkpoint.reading import read_average, read_file
from sat_ext.config import load, read_yaml
from sat_ext.convert import lora as adapters
from sat_ext.convert.architecture import (
    AUTOENCODER,
    TRANSFORMER,
    autoencoder_config,
    config_of,
    count,
    transformer_config,
)
from sat_ext.convert.files import read_safetensors, read_tensors
from sat_ext.convert.names import adapter_rows, to_diffusers, transformer_rows
from sat_ext.convert.parts import ConvertOptions, Part, checked, take_sat_only
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.models.config import ModelConfig

PREFIX = "model.diffusion_model."  # of the transformer in a checkpoint of CogVideo's engine
AUTOENCODER_FILE = "3d-vae.pt"
SAT_ONLY_FILE = "sat_only.safetensors"
LORA_YAML = "lora.yaml"
_ENGINE, _FIRST_STAGE = "network.", "first_stage_model."
_LAYERS = r"transformer\.layers\.(\d+)\."


def read_transformer(path: Path, options: ConvertOptions) -> Part | None:
    """The transformer in `path`, or a LoRA of one; None if there is neither. Raises `ConfigError`.

    `path` is a folder of SAT's (with `latest`), of diffusers', of a run or of several, the parent of one called
    `transformer`, or a file. Unless `options.with_base` is false, a LoRA alone gets the weights of
    `options.base_weights` or of the base that the checkpoint names, if there is one."""
    if path.is_file():
        part = _lora_file(path, options) if path.suffix == ".safetensors" else _checkpoint(path, options)
    elif not path.is_dir():
        raise ConfigError(f"{path}: there is no such file or folder; name a checkpoint or a model's folder.")
    else:
        lora = path / adapters.FILE
        # SAT's weights with diffusers' LoRA beside them are in neither layout as a whole
        part = _folder(path, replace(options, to=None) if lora.is_file() and options.to == "sat" else options)
        if part is None and lora.is_file():
            part = _lora_file(lora, options)
        elif part is not None and lora.is_file():
            part = replace(part, lora=adapters.read(lora, options.alpha))
    if part is None or part.config is not None or not options.with_base:
        return part
    return _with_base(part, path, options)


def _folder(path: Path, options: ConvertOptions) -> Part | None:
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if (folder / WEIGHTS_NAME).is_file():
        return _checkpoint(folder / WEIGHTS_NAME, options)
    if (folder / "latest").is_file():
        return _checkpoint(find_weights(folder), options)
    if (config := _config_in(folder, TRANSFORMER)) is not None:
        return _diffusers(folder, config, options)
    return _checkpoint(find_weights(find_run(path)), options) if any(path.glob("*/latest")) else None


def read_autoencoder(path: Path, options: ConvertOptions) -> Part | None:
    """The autoencoder in `path`: a folder of SAT's or of diffusers', the one above, or a file; None if there is
    none. Raises `ConfigError`."""
    if path.is_file():
        return None if path.suffix == ".safetensors" else _first_stage(path, options)
    for folder in (path / "vae", path):
        if (folder / AUTOENCODER_FILE).is_file():
            return _first_stage(folder / AUTOENCODER_FILE, options)
        if (config := _config_in(folder, AUTOENCODER)) is not None:
            return _diffusers(folder, config, options)
    return None


def _config_in(folder: Path, name: str) -> dict[str, Any] | None:
    """The folder's config.json with all defaults; None unless there is one of the class `name`."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error}); copy or download it again.") from error
    if not isinstance(config, dict) or config.get("_class_name") != name:
        return None
    return config_of(config, str(file))


def _diffusers(folder: Path, config: dict[str, Any], options: ConvertOptions) -> Part:
    options.reject_layout("diffusers", str(folder))
    extra = folder / SAT_ONLY_FILE
    return Part(
        where=str(folder),
        weights=checked(read_safetensors(folder), config, str(folder), layout="diffusers"),
        config=config,
        sat_only=read_tensors(extra) if extra.is_file() else {},
    )


def _lora_file(file: Path, options: ConvertOptions) -> Part:
    options.reject_layout("diffusers", str(file))
    return Part(where=str(file), weights={}, config=None, lora=adapters.read(file, options.alpha))


def _named_weights(file: Path) -> dict[str, Tensor]:
    """The weights in a file of SAT's or torch's: under `module`, under `state_dict`, or on their own."""
    state = read_file(file)
    for name in ("module", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not any(isinstance(t, Tensor) for t in state.values()):
        raise ConfigError(f"{file}: holds no weights by name; name a checkpoint of SAT's or of a run.")
    return {str(name): t for name, t in state.items() if isinstance(t, Tensor)}


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def _checkpoint(file: Path, options: ConvertOptions) -> Part | None:
    if file.with_name("mp_rank_01_model_states.pt").exists():
        raise ConfigError(
            f"{file.parent}: the weights are split over several model-parallel ranks; merge them with "
            "model_parallel_size 1 first."
        )
    weights = _named_weights(file) | (read_average(file) if options.ema else {})
    if own := _under(_ENGINE, weights):
        return _engine(file, own, options)
    beginnings = sorted({name.split(".")[0] for name in weights})
    if own := _under(PREFIX, weights):
        return replace(_sat(file, own, options), left_out=tuple(b for b in beginnings if b != "model"))
    if "encoder" in beginnings and "decoder" in beginnings:
        return None  # an autoencoder
    raise ConfigError(
        f"{file}: no tensor of CogVideoX under {PREFIX} (first: {next(iter(weights))}); these are weights of "
        "another model."
    )


def _sat(file: Path, own: Mapping[str, Tensor], options: ConvertOptions) -> Part:
    """CogVideo's transformer, by the names under `PREFIX`."""
    where, folder = str(file), file.parent.parent
    matrices = {n: t for n, t in own.items() if ".matrix_" in n}
    plain = {n.replace(".original.", "."): t for n, t in own.items() if n not in matrices}  # as if without a LoRA
    base, lora = options.base or _yaml_in(folder), None
    if matrices:
        alphas = (options.alpha, adapters.alpha_of(base), adapters.alpha_of(_yaml_in(folder, LORA_YAML)))
        alpha = next((a for a in alphas if a is not None), None)
        lora = adapters.from_sat(adapter_rows(count(matrices, _LAYERS)), matrices, alpha, where)
        if not options.with_base:
            plain = {}
        if "time_embed.0.weight" not in plain:  # nothing but what was trained
            weights = to_diffusers(transformer_rows(count(plain, _LAYERS)), plain)
            return Part(where=where, weights=weights, config=None, lora=lora)
    else:  # a LoRA's checkpoint is put together with its base in SAT's layout too
        options.reject_layout("sat", where)
    config = _config_in(folder, TRANSFORMER) or transformer_config(plain, base, options.size, where)
    sat_only = take_sat_only(plain, config, where)
    weights = checked(plain, config, where, layout="sat")
    return Part(where=where, weights=weights, config=config, lora=lora, sat_only=sat_only)


def _yaml_in(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """The YAML beside a run's checkpoints; empty if there is none."""
    return read_yaml([str(folder / name)]) if (folder / name).is_file() else {}


def _engine(file: Path, weights: Mapping[str, Tensor], options: ConvertOptions) -> Part:
    """The built-in engine's transformer: diffusers' names, with peft's for a LoRA."""
    where, section = str(file), _yaml_in(file.parent.parent).get("model")
    if not section:
        raise ConfigError(f"{file.parent.parent}: there is no {CONFIG_NAME} with the run's model; name a run.")
    model = load(ModelConfig, section, f"{CONFIG_NAME}: model")
    matrices = {n: t for n, t in weights.items() if ".lora_" in n}
    plain = {n.replace(".base_layer.", "."): t for n, t in weights.items() if n not in matrices}
    alpha = model.train.alpha if options.alpha is None else options.alpha
    lora = adapters.from_peft(matrices, alpha, where, rslora=model.train.rslora) if matrices else None
    if not plain:
        return Part(where=where, weights={}, config=None, lora=lora)
    config = _config_in(Path(model.pretrained) / "transformer", TRANSFORMER) if model.pretrained else None
    if config is None:
        sizes = asdict(model.transformer)
        config = config_of({"_class_name": TRANSFORMER, **sizes}, f"{CONFIG_NAME}: model.transformer")
    weights = checked(plain, config, where, layout="diffusers")
    return Part(where=where, weights=weights, config=config, lora=lora)


def _with_base(part: Part, path: Path, options: ConvertOptions) -> Part:
    """A LoRA with the weights that it belongs to, if they are known."""
    file = Path(part.where)
    own = _yaml_in(file.parent.parent)
    place = options.base_weights
    if place is None and (named := read_base(file.parent)) is not None:
        place = find_weights(*named)
    if place is None and (pretrained := (own.get("model") or {}).get("pretrained")):
        place = Path(pretrained)
    if place is None:
        return part
    # CogVideo's YAML of a run describes the base too, which has none beside it
    yaml = options.base or (own if engine_of(own.get("model")).is_cogvideo else None)
    base = read_transformer(place, replace(options, base_weights=None, base=yaml, to=None, ema=False))
    if base is None or base.config is None:
        raise ConfigError(
            f"{place}: holds no transformer that {path} could belong to; give its base with --base-weights."
        )
    return replace(part, weights={**base.weights, **part.weights}, config=base.config, sat_only=base.sat_only)


def _first_stage(file: Path, options: ConvertOptions) -> Part | None:
    weights = _named_weights(file)
    weights = _under(_FIRST_STAGE, weights) or weights
    sat_only = {n: weights.pop(n) for n in list(weights) if n.startswith("loss.")}  # of its own training
    if not any(n.startswith("encoder.") for n in weights):
        return None
    options.reject_layout("sat", str(file))
    base = options.base or _yaml_in(file.parent.parent)
    config = _config_in(file.parent, AUTOENCODER)
    config = config or autoencoder_config(weights, base, options.scale_factor, str(file))
    weights = checked(weights, config, str(file), layout="sat")
    return Part(where=str(file), weights=weights, config=config, sat_only=sat_only)
