"""What CogVideo's engine would fail on, or train wrongly on, after its weights are loaded: said before that.

CogVideo has two generations, told apart by the network's `patch_size`: a number in CogVideoX 1.0 (tag v1.0 of the
repository), three numbers in 1.5 (its main branch). Names of keys are those of CogVideo's model YAMLs.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sat_ext.cogvideo import __all__ as TARGETS
from sat_ext.cogvideox import LATENT_SIDE, SCALE_FACTOR, latent_frames, pixel_frames
from sat_ext.errors import ConfigError
from sat_ext.ranks import rank_and_world
from sat_ext.types import Bucket

OURS = "sat_ext.cogvideo."
LOSS = OURS + "JointDiffusionLoss"
SAMPLER = OURS + "PaddedSampler"
LOSS_OPTIONS = ("parent", "loss_weights", "condition_dropout", "condition_scale", "scale_factor")
OVERLAY = "sat_ext_overlay"  # the key of `model` in which an overlay says what it is for
NETWORK = "dit_video_concat.DiffusionTransformer"
_FRAMES = "data.params.buckets.frames"


@dataclass(frozen=True, kw_only=True)
class Network:
    """What decides the shapes that CogVideo's network takes; None where the YAML does not say.

    `patch` is (frames, rows, columns) in latents; `frames`, `rows` and `columns` are the sizes of its table of
    positions, in latents.
    """

    generation: str | None
    patch: tuple[int, int, int]
    frames: int | None
    rows: int | None
    columns: int | None
    position: str
    position_params: Mapping[str, Any]
    final_layer: str
    learned: bool
    needs_ofs: bool


def read_network(model: Mapping[str, Any]) -> Network:
    """The network of CogVideo's `model` section. Raises `ConfigError` for a `patch_size` that is neither kind."""
    config = model["network_config"]
    params = config.get("params") or {}
    modules = params.get("modules") or {}
    position = modules.get("pos_embed_config") or {}
    patch = params.get("patch_size", 2)
    three = list(patch) if isinstance(patch, Sequence) and not isinstance(patch, str) else [1, patch, patch]
    if len(three) != 3 or not all(isinstance(p, int) and p > 0 for p in three):
        raise ConfigError(
            f"model.network_config.params.patch_size: {patch!r} is neither a number (CogVideoX 1.0) nor three "
            "(1.5); use the model YAML of CogVideo as it is."
        )
    table = params.get("num_frames")
    return Network(
        generation=None if "patch_size" not in params else "1.0" if isinstance(patch, int) else "1.5",
        patch=(three[0], three[1], three[2]),
        frames=None if table is None else latent_frames(int(table)),
        rows=params.get("latent_height"),
        columns=params.get("latent_width"),
        position=str(position.get("target", "")),
        position_params=position.get("params") or {},
        final_layer=str((modules.get("final_layer_config") or {}).get("target", "")),
        learned=bool((position.get("params") or {}).get("learnable_pos_embed")),
        needs_ofs=params.get("ofs_embed_dim") is not None,
    )


def is_conditioned(model: Mapping[str, Any]) -> bool:
    """Whether the model is image-to-video. From a cache its engine makes no condition, its network takes one."""
    network = model["network_config"].get("params") or {}
    twice = network.get("in_channels") == 2 * network.get("out_channels", 0)
    return bool(model.get("noised_image_input")) or twice


def weighs(model: Mapping[str, Any]) -> bool:
    """Whether the loss knows the batches' `loss_weight`: our engine's does, CogVideo's own does not.

    `model` is the YAML's section, which may be empty.
    """
    return "network_config" not in model or _target(model.get("loss_fn_config")) == LOSS


def check_model(model: Mapping[str, Any], buckets: Sequence[Bucket]) -> None:
    """Raise `ConfigError` where CogVideo's engine, as the YAML's `model` section builds it, cannot train on
    samples of these shapes, or would learn something else than what they show."""
    _check_targets(model, "model")
    network = read_network(model)
    _check_overlays(model, network)
    _check_text(model, network)
    loss = model.get("loss_fn_config") or {}
    joint = _target(loss) == LOSS
    if model.get("latent_input"):
        raise ConfigError(
            "model.latent_input: true says that clips come encoded, and ours come as pixels; set it to false "
            "(configs/cogvideo/1.5.yaml does)."
        )
    if is_conditioned(model) and not joint and any(b.frames == 1 for b in buckets):
        raise ConfigError(
            f"{_FRAMES}: CogVideo's own loss would show a still of an image-to-video model its target as the "
            f"condition; name {LOSS} in model.loss_fn_config.target, or leave 1 out of the list."
        )
    if not is_conditioned(model) and (loss.get("params") or {}).get("condition_dropout"):
        raise ConfigError(
            "model.loss_fn_config.params.condition_dropout: this model has no image condition to drop "
            "(noised_image_input is not set); leave configs/cogvideo/i2v.yaml out."
        )
    if network.needs_ofs and not joint:
        raise ConfigError(
            "model.loss_fn_config.target: CogVideo's own loss does not pass 'ofs', which this network asks for "
            f"(ofs_embed_dim); name {LOSS}."
        )
    _check_options(model, joint)
    for bucket in buckets:
        _check_length(bucket, network, joint)
        _check_size(bucket, network)


def check_run(args: argparse.Namespace, model: Mapping[str, Any], buckets: Sequence[Bucket]) -> None:
    """Raise `ConfigError` where the run would fail in the checkout that is being run: for what `check_model` looks
    for, a model of the other generation, and an evaluation that cannot show its stills."""
    check_model(model, buckets)
    network = read_network(model)
    if not args.save:
        raise ConfigError("args.save: missing, and CogVideo's script writes its YAML there; name a folder.")
    transformer = (model["network_config"].get("params") or {}).get("transformer_args") or {}
    ranks = transformer.get("model_parallel_size", 1)
    if ranks != args.model_parallel_size:
        raise ConfigError(
            f"args.model_parallel_size: {args.model_parallel_size}, and the network is for {ranks} "
            "(transformer_args in model.network_config.params); write the same number in both."
        )
    checkout = _generation_of_checkout(model)
    if checkout and network.generation and checkout != network.generation:
        branch = {"1.0": "tag v1.0", "1.5": "branch main"}
        raise ConfigError(
            f"model.network_config.params.patch_size: this is the YAML of a CogVideoX {network.generation} model, "
            f"and the code that runs is of CogVideo's {branch[checkout]}; check out {branch[network.generation]}, "
            f"or name the YAML of a {checkout} model."
        )
    _check_noise_levels(model, checkout)
    sampler = _target(model.get("sampler_config"))
    odd = any(latent_frames(b.frames) % network.patch[0] for b in buckets)
    if checkout == "1.5" and sampler not in ("", SAMPLER) and args.eval_interval and (odd or network.needs_ofs):
        raise ConfigError(
            f"model.sampler_config.target: {sampler} takes even numbers of latent frames only and is not given "
            "'ofs', so the first evaluation would fail; append configs/cogvideo/1.5.yaml."
        )
    short = [b for b in buckets if latent_frames(b.frames) < 3]
    if checkout == "1.5" and short and args.eval_interval and not getattr(args, "only_log_video_latents", False):
        raise ConfigError(
            "args.only_log_video_latents: false has every evaluation decode what it sampled, and CogVideo's main "
            f"branch takes 3 latent frames for it, of which a bucket of {short[0].frames} frames has "
            f"{latent_frames(short[0].frames)}; set it to true."
        )


def _check_noise_levels(model: Mapping[str, Any], checkout: str | None) -> None:
    """The main branch asserts while it builds its own loss that its groups of noise levels divide the ranks."""
    loss = model.get("loss_fn_config") or {}
    params = ((loss.get("params") or {}).get("sigma_sampler_config") or {}).get("params") or {}
    groups, ranks = params.get("group_num", 0), rank_and_world()[1]
    uniform = checkout == "1.5" and params.get("uniform_sampling") and ranks > 8
    if uniform and _target(loss) != LOSS and (not groups or ranks % groups):
        raise ConfigError(
            f"model.loss_fn_config.params.sigma_sampler_config.params.group_num: {groups} does not divide {ranks} "
            f"ranks, which CogVideo's loss insists on; name {LOSS} in model.loss_fn_config.target, which takes "
            "groups that do, or set uniform_sampling: false."
        )


def _check_options(model: Mapping[str, Any], joint: bool) -> None:
    """Options of our loss and sampler that have no effect, or one that nobody means."""
    loss = (model.get("loss_fn_config") or {}).get("params") or {}
    if not joint and (ours := [o for o in LOSS_OPTIONS if o in loss]):
        raise ConfigError(
            f"model.loss_fn_config.params.{ours[0]}: an option of {LOSS}, and the target is another; append "
            "configs/cogvideo/joint.yaml."
        )
    own, given = float(model.get("scale_factor", 1.0)), loss.get("scale_factor", SCALE_FACTOR)
    if loss.get("condition_scale") is not None and is_conditioned(model) and given != own:
        raise ConfigError(
            f"model.loss_fn_config.params.scale_factor: {given}, but model.scale_factor is {own}, so the "
            "condition would not be at condition_scale; write the same number in both."
        )
    sampler = model.get("sampler_config") or {}
    shown = (sampler.get("params") or {}).get("condition_scale")
    if is_conditioned(model) and _target(sampler) == SAMPLER and shown != loss.get("condition_scale"):
        raise ConfigError(
            f"model.sampler_config.params.condition_scale: {shown}, but the loss trains at "
            f"{loss.get('condition_scale')} (model.loss_fn_config.params), so evaluations would show another "
            "model than the trained one; write the same number in both."
        )
    prefixes = model.get("not_trainable_prefixes") or []
    modules = (model["network_config"].get("params") or {}).get("modules") or {}
    if "all" in prefixes and "lora_config" not in modules:
        raise ConfigError(
            "model.not_trainable_prefixes: 'all' leaves only LoRA to train, and the network has none "
            "(lora_config); append configs/cogvideo/lora.yaml, or name CogVideo's YAML with LoRA."
        )


def _check_targets(section: Any, place: str) -> None:
    """Names of ours that are not there, wherever they stand: CogVideo finds out when it builds that part."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        name = str(value).removeprefix(OURS)
        if key == "target" and name != value and name not in TARGETS:
            near = difflib.get_close_matches(name, TARGETS, n=1) or TARGETS
            raise ConfigError(f"{place}.target: there is no '{value}'; there is {OURS}{f', {OURS}'.join(near)}.")
        _check_targets(value, f"{place}.{key}")
    for number, value in enumerate(section if isinstance(section, list | tuple) else ()):
        _check_targets(value, f"{place}[{number}]")


def _check_overlays(model: Mapping[str, Any], network: Network) -> None:
    """Files of configs/cogvideo/ that are made for another model than the one they are appended to."""
    made_for = model.get(OVERLAY)
    if made_for is not None and network.generation and str(made_for) != network.generation:
        raise ConfigError(
            f"model.{OVERLAY}: an overlay for CogVideoX {made_for} is appended to the YAML of a "
            f"{network.generation} model; leave it out, or name the YAML of a {made_for} model."
        )
    rotary = "hidden_size_head" in network.position_params
    expected = OURS + ("InterpolatedRotaryPositionEmbedding" if rotary else "SinusoidalPositionEmbedding")
    if network.position.startswith(OURS) and network.position != expected:
        raise ConfigError(
            f"model.network_config.params.modules.pos_embed_config.target: {network.position} is not for this "
            f"model's {'rotary' if rotary else 'sinusoidal'} positions; append configs/cogvideo/sizes-"
            f"{'5b' if rotary else '2b'}.yaml instead."
        )


def _check_text(model: Mapping[str, Any], network: Network) -> None:
    """An entry of `emb_models` replaces CogVideo's whole, its length of captions too."""
    length = network.position_params.get("text_length")
    models = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    for i, embedder in enumerate(models):
        own = (embedder.get("params") or {}).get("max_length")
        if embedder.get("input_key", "txt") == "txt" and None not in (own, length) and own != length:
            raise ConfigError(
                f"model.conditioner_config.params.emb_models[{i}].params.max_length: {own}, but this model takes "
                f"captions of {length} tokens (pos_embed_config.params.text_length); write {length}."
            )


def _check_length(bucket: Bucket, network: Network, joint: bool) -> None:
    latents, step = latent_frames(bucket.frames), network.patch[0]
    if latents % step and not joint:
        below = latents // step * step
        lengths = [pixel_frames(n) for n in (below, below + step) if n]
        raise ConfigError(
            f"{_FRAMES}: {bucket.frames} frames are {latents} latent frames, and this model takes multiples of "
            f"{step}; name {LOSS} in model.loss_fn_config.target, which pads them, or use "
            f"{' or '.join(map(str, lengths))}."
        )
    if network.frames is None or (network.position.startswith(OURS) and not network.learned):
        return  # ours count on
    most = network.frames * step
    if latents > most:
        longest = pixel_frames(most)
        raise ConfigError(
            f"{_FRAMES}: {bucket.frames} frames are {latents} latent frames, and this model has positions for "
            f"{most} (num_frames in model.network_config.params); use {longest} or less."
        )


def _check_size(bucket: Bucket, network: Network) -> None:
    if network.rows is None or network.columns is None:
        return
    rows, columns = bucket.height // LATENT_SIDE, bucket.width // LATENT_SIDE
    known = f"{network.rows * LATENT_SIDE}x{network.columns * LATENT_SIDE}"
    if network.generation == "1.5":
        if network.position.startswith(OURS):
            return
        if rows > network.rows or columns > network.columns:
            raise ConfigError(
                f"bucket {bucket}: this model has positions for {known} pixels (latent_height and latent_width in "
                "model.network_config.params); use a smaller size."
            )
        return
    fixed = [t for t in (network.position, network.final_layer) if not t.startswith(OURS)]
    if fixed and (rows, columns) != (network.rows, network.columns):
        raise ConfigError(
            f"bucket {bucket}: {fixed[0] or 'this network'} is right at {known} pixels only; use that size, or "
            "append configs/cogvideo/sizes-2b.yaml or sizes-5b.yaml, whichever the model is."
        )


def _generation_of_checkout(model: Mapping[str, Any]) -> str | None:
    """Of the network class that the run will build; None for a class that is not CogVideo's."""
    if _target(model["network_config"]) != NETWORK:
        return None
    module, _, name = NETWORK.rpartition(".")
    try:
        network = getattr(import_module(module), name)
    except ImportError:  # its own script will say what is missing
        return None
    # what 1.5 brought, and 1.0 would take for an argument of SAT's
    return "1.5" if "ofs_embed_dim" in inspect.signature(network.__init__).parameters else "1.0"


def _target(config: Any) -> str:
    return str((config or {}).get("target", ""))
