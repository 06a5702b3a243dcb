"""diffusers' config.json of a model, from the shapes of SAT's tensors and from CogVideo's YAML if it is given.

Shapes show everything but the size of the video that a model is for and the autoencoder's scale."""

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor

from sat_ext.cogvideo.network import read_network, transformer_values
from sat_ext.cogvideox import LATENT_SIDE, PATCH, SCALE_FACTOR, SCALE_FACTOR_2B, TEXT_TOKENS
from sat_ext.config import convert
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

Model = Any  # one of the two classes, which have no types
TRANSFORMER, AUTOENCODER = "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX"
# Native sizes of the published models (configs/cogvideox_*.yaml at tag v1.0, configs/cogvideox1.5_*.yaml on main).
NATIVE = {"1.0": Bucket(frames=49, height=480, width=720), "1.5": Bucket(frames=81, height=2400, width=2400)}
YAML = "YAML (of --base, or training_config.yaml beside the checkpoint)"
SECTION = f"{YAML}: model"


def empty_model(config: Mapping[str, Any], where: str = "config.json") -> Model:
    """The model that a config.json describes, without memory for its weights. `ConfigError` for invalid values."""
    cls = {TRANSFORMER: CogVideoXTransformer3DModel, AUTOENCODER: AutoencoderKLCogVideoX}[config["_class_name"]]
    # diffusers takes sizes of 0 and the like, and builds nonsense or fails somewhere deep in the model
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        value = config.get(key, parameter.default)
        if value != parameter.default and not _can_be(value, parameter):
            raise ConfigError(f"{where}: {key} is {value!r}, which no model can have; fix that value.")
    try:
        with torch.device("meta"):
            model: Model = cls.from_config(dict(config))
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{where}: no model can be made from its values ({reason}); fix them.") from error
    return model


def _can_be(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether a size may have this value; always true for other parameters."""
    whole = parameter.annotation is int or parameter.name in ("patch_size_t", "ofs_embed_dim")
    if not whole and type(parameter.default) not in (int, float):
        return True
    return type(value) in ((int,) if whole else (int, float)) and value > 0


def config_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json with these values and diffusers' defaults for the others, as older files lack newer keys."""
    return {**json.loads(empty_model(values, where).to_json_string()), **values}


def transformer_config(
    weights: Mapping[str, Tensor], base: Mapping[str, Any] | None, size: Bucket | None, where: str
) -> dict[str, Any]:
    """config.json of SAT's transformer.

    `weights` by the names under `model.diffusion_model.`; `base` is CogVideo's YAML of the model. `size`, of the
    video in pixels, wins over the YAML's; without either it is the published models'. Raises `ConfigError` if a
    tensor that every transformer has is missing, or the YAML is of another model."""
    given = transformer_values(read_network(base.get("model") or {}, SECTION), SECTION) if base else {}
    # a linear patch embedding does not show how its patch is shared out over time, height and width
    seen = _seen(weights, given.get("patch_size_t") or PATCH, given.get("patch_size", PATCH), where)
    for key, value in seen.items():
        if given.get(key, value) != value:
            raise ConfigError(
                f"{where}: {key} is {value}, but {given[key]} in the {YAML}; give the YAML of these weights with "
                "--base."
            )
    values = {"max_text_seq_length": TEXT_TOKENS, **seen, **given}
    if size is None and not base:
        size = NATIVE["1.0" if seen["patch_size_t"] is None else "1.5"]
    if size is not None:
        values["sample_height"], values["sample_width"] = size.height // LATENT_SIDE, size.width // LATENT_SIDE
        values["sample_frames"] = size.frames
    return config_of({"_class_name": TRANSFORMER, **values}, where)


def _seen(weights: Mapping[str, Tensor], patch_t: int | None, patch: int, where: str) -> dict[str, Any]:
    """What the shapes show; the patch is that of models with a linear patch embedding."""

    def shape(name: str, *ranks: int) -> torch.Size:
        return _shape(weights, name, ranks, where, "transformer")

    time_embed, hidden = shape("time_embed.0.weight", 2)
    (head,) = shape("mixins.adaln_layer.query_layernorm_list.0.weight", 1)
    proj, out = shape("mixins.patch_embed.proj.weight"), shape("mixins.final_layer.linear.weight", 2)[0]
    if len(proj) == 4:  # 1.0 has a convolution over the frame, 1.5 a linear layer over patches of several frames
        patch_t, patch = None, proj[2]
    elif len(proj) != 2:
        raise ConfigError(
            f"{where}: mixins.patch_embed.proj.weight is {list(proj)}, of no known generation; only CogVideoX "
            "1.0 and 1.5 can be converted."
        )
    rotary = "mixins.pos_embed.freqs_sin" in weights or patch_t is not None
    ofs = "ofs_embed.0.weight"
    return {
        "num_layers": count(weights, r"transformer\.layers\.(\d+)\."),
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "in_channels": proj[1] // (1 if patch_t is None else patch_t * patch**2),
        "out_channels": out // ((patch_t or 1) * patch**2),
        "time_embed_dim": time_embed,
        "ofs_embed_dim": shape(ofs, 2)[1] if ofs in weights else None,
        "text_embed_dim": shape("mixins.patch_embed.text_proj.weight", 2)[1],
        "patch_size": patch,
        "patch_size_t": patch_t,
        "patch_bias": patch_t is None and "mixins.patch_embed.proj.bias" in weights,
        "use_rotary_positional_embeddings": rotary,
        "use_learned_positional_embeddings": rotary and "mixins.pos_embed.pos_embedding" in weights,
    }


def _shape(weights: Mapping[str, Tensor], name: str, ranks: tuple[int, ...], where: str, kind: str) -> torch.Size:
    """The tensor's shape, which has one of these numbers of dimensions (any if none is given), none of size 0."""
    if name not in weights:
        raise ConfigError(f"{where}: there is no {name}; this is no CogVideoX {kind}, or not a whole one.")
    shape = weights[name].shape
    if (ranks and len(shape) not in ranks) or 0 in shape:
        raise ConfigError(
            f"{where}: {name} is {list(shape)}, which no CogVideoX {kind} has; these are weights of another model."
        )
    return shape


def autoencoder_config(
    weights: Mapping[str, Tensor], base: Mapping[str, Any] | None, scale: float | None, where: str
) -> dict[str, Any]:
    """config.json of SAT's autoencoder, whose `scale` is in CogVideo's YAML (`base`), not in the weights."""

    def channels(name: str) -> torch.Size:
        return _shape(weights, f"{name}.conv.weight", (5,), where, "autoencoder")

    first, latent = channels("encoder.down.0.block.0.conv1")[0], channels("decoder.conv_in")[1]
    given = (base or {}).get("model") or {}
    factor = scale if scale is not None else convert(float | None, given.get("scale_factor"), "model.scale_factor")
    if factor is None:
        raise ConfigError(
            f"{where}: the scale of its latents is not in the weights; give CogVideo's YAML with --base, or "
            f"--scale-factor ({SCALE_FACTOR_2B} for 2B, {SCALE_FACTOR} for the others)."
        )
    is_cogvideo = engine_of(given).is_cogvideo
    levels = count(weights, r"encoder\.down\.(\d+)\.")
    config = {
        "_class_name": AUTOENCODER,
        "block_out_channels": [first, *(channels(f"encoder.down.{i}.block.0.conv1")[0] for i in range(1, levels))],
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "layers_per_block": count(weights, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": latent,
        "scaling_factor": float(factor),
        # as published beside 1.5's I2V model, the only one with `ofs`; see CogVideoXImageToVideoPipeline
        "invert_scale_latents": is_cogvideo and read_network(given, SECTION).ofs_embed_dim is not None,
    }
    return config_of(config, where)


def count(names: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that `pattern` finds at the start of a name."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
