"""What CogVideo's engine would fail on, or train wrongly on, reported before it loads its weights."""

import argparse
import difflib
import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from sat_ext.cogvideo import __all__ as TARGETS
from sat_ext.cogvideo.network import (
    CACHED_FIRST_STAGE,
    LOSS,
    OURS,
    ROTARY,
    SAMPLER,
    SINUSOIDAL,
    Network,
    component_of,
    read_network,
)
from sat_ext.cogvideox import LATENT_SIDE, SCALE_FACTOR, latent_frames, pixel_frames
from sat_ext.errors import ConfigError
from sat_ext.ranks import rank_and_world
from sat_ext.types import Bucket

LOSS_OPTIONS = ("parent", "loss_weights", "condition_dropout", "condition_scale", "scale_factor")
OVERLAY = "sat_ext_overlay"  # the key of `model` in which an overlay says what it is for
_FRAMES = "data.params.buckets.frames"


def check_model(model: Mapping[str, Any], buckets: Sequence[Bucket]) -> None:
    """Raise `ConfigError` where CogVideo's engine, as the YAML's `model` section builds it, cannot train on
    samples of these shapes, or would learn something else than they show."""
    _check_targets(model, "model")
    network, loss = read_network(model), component_of(model, "loss_fn_config")
    joint = loss.target == LOSS
    _check_overlays(model, network)
    _check_text(model, network)
    if model.get("latent_input"):
        raise ConfigError(
            "model.latent_input: true expects encoded clips, and ours are pixels; set it to false "
            "(configs/cogvideo/1.5.yaml does)."
        )
    if network.is_conditioned and not joint and any(b.frames == 1 for b in buckets):
        raise ConfigError(
            f"{_FRAMES}: CogVideo's own loss would show a still of an image-to-video model its target as the "
            f"condition; name {LOSS} in model.loss_fn_config.target, or leave 1 out of the list."
        )
    if not network.is_conditioned and loss.params.get("condition_dropout"):
        raise ConfigError(
            "model.loss_fn_config.params.condition_dropout: this model has no image condition to drop "
            "(noised_image_input is not set); leave configs/cogvideo/i2v.yaml out."
        )
    if network.ofs_embed_dim is not None and not joint:
        raise ConfigError(
            "model.loss_fn_config.target: CogVideo's own loss does not pass 'ofs', which this network needs "
            f"(ofs_embed_dim); name {LOSS}."
        )
    _check_options(model, network)
    for bucket in buckets:
        _check_length(bucket, network, joint)
        _check_size(bucket, network)


def check_run(args: argparse.Namespace, model: Mapping[str, Any], buckets: Sequence[Bucket]) -> None:
    """`check_model`, and raise `ConfigError` where the checkout that runs would fail: on a model of the other
    generation, or in an evaluation of these shapes."""
    check_model(model, buckets)
    network = read_network(model)
    if not args.save:
        raise ConfigError("args.save: missing, and CogVideo's script writes its YAML there; name a folder.")
    if network.model_parallel_size != args.model_parallel_size:
        raise ConfigError(
            f"args.model_parallel_size: {args.model_parallel_size}, and the network is for "
            f"{network.model_parallel_size} (transformer_args in model.network_config.params); write the same "
            "number in both."
        )
    checkout = _generation_of_checkout(network)
    if checkout and network.generation and checkout != network.generation:
        branch = {"1.0": "tag v1.0", "1.5": "branch main"}
        raise ConfigError(
            f"model.network_config.params.patch_size: this is the YAML of a CogVideoX {network.generation} model, "
            f"and the code that runs is of CogVideo's {branch[checkout]}; check out {branch[network.generation]}, "
            f"or name the YAML of a {checkout} model."
        )
    if checkout == "1.5":
        _check_noise_levels(model)
        if args.eval_interval:
            _check_evaluation(args, model, network, buckets)


def _check_noise_levels(model: Mapping[str, Any]) -> None:
    # the main branch asserts, while it builds its own loss, that its groups of noise levels divide the ranks
    loss = component_of(model, "loss_fn_config")
    levels = component_of(loss.params, "sigma_sampler_config").params
    groups, ranks = levels.get("group_num", 0), rank_and_world()[1]
    if loss.target != LOSS and levels.get("uniform_sampling") and ranks > 8 and (not groups or ranks % groups):
        raise ConfigError(
            f"model.loss_fn_config.params.sigma_sampler_config.params.group_num: {groups} does not divide {ranks} "
            f"ranks, as CogVideo's loss requires; name {LOSS} in model.loss_fn_config.target, which takes "
            "groups that do, or set uniform_sampling: false."
        )


def check_cache(args: argparse.Namespace, model: Mapping[str, Any], *, is_cached: bool) -> None:
    """Raise `ConfigError` where the section and the arguments do not go with a cache, or with training without."""
    stage, loss = component_of(model, "first_stage_config").target, component_of(model, "loss_fn_config").target
    if not is_cached:
        if stage == CACHED_FIRST_STAGE:
            raise ConfigError(
                f"model.first_stage_config.target: {stage} takes latents; set data.params.cache.folder to what "
                "sat-ext cache wrote."
            )
        return
    if stage != CACHED_FIRST_STAGE:
        raise ConfigError(
            f"data.params.cache: CogVideo's engine takes latents through model.first_stage_config.target: "
            f"{CACHED_FIRST_STAGE}, and the YAML has {stage}; append configs/cogvideo/cached.yaml."
        )
    if loss != LOSS and read_network(model).is_conditioned:
        raise ConfigError(
            f"data.params.cache: the cached condition goes through model.loss_fn_config.target: {LOSS}, and the "
            f"YAML has {loss}; append configs/cogvideo/joint.yaml."
        )
    if args.model_parallel_size > 1:
        raise ConfigError(
            "data.params.cache: CogVideo's script does not hand cached conditions to ranks that share a model; "
            "set args.model_parallel_size: 1."
        )
    if args.eval_interval:
        raise ConfigError(
            f"args.eval_interval: {args.eval_interval}, but CogVideo's evaluations decode samples, and a run from "
            "data.params.cache has no first stage; set it to null."
        )


def _check_evaluation(
    args: argparse.Namespace, model: Mapping[str, Any], network: Network, buckets: Sequence[Bucket]
) -> None:
    # the main branch samples in every evaluation, and decodes what it sampled
    sampler = component_of(model, "sampler_config").target
    odd = any(latent_frames(b.frames) % network.patch[0] for b in buckets)
    if sampler not in ("", SAMPLER) and (odd or network.ofs_embed_dim is not None):
        raise ConfigError(
            f"model.sampler_config.target: {sampler} takes even numbers of latent frames only and is not given "
            "'ofs', so the first evaluation would fail; append configs/cogvideo/1.5.yaml."
        )
    short = [b for b in buckets if latent_frames(b.frames) < 3]
    if short and not getattr(args, "only_log_video_latents", False):
        raise ConfigError(
            "args.only_log_video_latents: false has every evaluation decode what it sampled, and CogVideo's main "
            f"branch takes 3 latent frames for it, of which a bucket of {short[0].frames} frames has "
            f"{latent_frames(short[0].frames)}; set it to true."
        )


def _check_options(model: Mapping[str, Any], network: Network) -> None:
    """Options of our loss and sampler that have no effect, or not the one that is meant."""
    loss, sampler = component_of(model, "loss_fn_config"), component_of(model, "sampler_config")
    if loss.target != LOSS and (ours := [o for o in LOSS_OPTIONS if o in loss.params]):
        raise ConfigError(
            f"model.loss_fn_config.params.{ours[0]}: an option of {LOSS}, and the target is another; append "
            "configs/cogvideo/joint.yaml."
        )
    scale, shown = loss.params.get("condition_scale"), sampler.params.get("condition_scale")
    own, given = float(model.get("scale_factor", 1.0)), loss.params.get("scale_factor", SCALE_FACTOR)
    if scale is not None and network.is_conditioned and given != own:
        raise ConfigError(
            f"model.loss_fn_config.params.scale_factor: {given}, but model.scale_factor is {own}, so the "
            "condition would not be at condition_scale; write the same number in both."
        )
    if network.is_conditioned and sampler.target == SAMPLER and shown != scale:
        raise ConfigError(
            f"model.sampler_config.params.condition_scale: {shown}, but the loss trains at {scale} "
            "(model.loss_fn_config.params), so evaluations would not show the model that trains; write the same "
            "number in both."
        )
    if "all" in (model.get("not_trainable_prefixes") or []) and network.lora_rank is None:
        raise ConfigError(
            "model.not_trainable_prefixes: 'all' leaves only LoRA to train, and the network has none "
            "(lora_config); append configs/cogvideo/lora.yaml, or name CogVideo's YAML with LoRA."
        )


def _check_targets(section: Any, place: str) -> None:
    """Misspelt names of our targets, anywhere in the section: CogVideo would fail when it builds that part."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        name = str(value).removeprefix(OURS)
        if key == "target" and name != value and name not in TARGETS:
            near = difflib.get_close_matches(name, TARGETS, n=1) or TARGETS
            raise ConfigError(f"{place}.target: there is no '{value}'; there is {OURS}{f', {OURS}'.join(near)}.")
        _check_targets(value, f"{place}.{key}")
    for number, value in enumerate(section if isinstance(section, list | tuple) else ()):
        _check_targets(value, f"{place}[{number}]")


def _check_overlays(model: Mapping[str, Any], network: Network) -> None:
    """Files of configs/cogvideo/ that are appended to a model that they are not made for."""
    made_for = model.get(OVERLAY)
    if made_for is not None and network.generation and str(made_for) != network.generation:
        raise ConfigError(
            f"model.{OVERLAY}: an overlay for CogVideoX {made_for} is appended to the YAML of a "
            f"{network.generation} model; leave it out, or name the YAML of a {made_for} model."
        )
    kind, fitting, overlay = ("rotary", ROTARY, "5b") if network.is_rotary else ("sinusoidal", SINUSOIDAL, "2b")
    if network.position.startswith(OURS) and network.position != fitting:
        raise ConfigError(
            f"model.network_config.params.modules.pos_embed_config.target: {network.position} is not for this "
            f"model's {kind} positions; append configs/cogvideo/sizes-{overlay}.yaml instead."
        )


def _check_text(model: Mapping[str, Any], network: Network) -> None:
    # an entry of `emb_models` in an overlay replaces CogVideo's whole, the length of its captions too
    for i, embedder in enumerate(component_of(model, "conditioner_config").params.get("emb_models") or []):
        where = f"model.conditioner_config.params.emb_models[{i}]"
        target, length = str(embedder.get("target")), (embedder.get("params") or {}).get("max_length")
        is_text = embedder.get("input_key", "txt") == "txt" and None not in (length, network.text_length)
        if is_text and length != network.text_length:
            raise ConfigError(
                f"{where}.params.max_length: {length}, but this model takes captions of {network.text_length} "
                f"tokens (pos_embed_config.params.text_length); write {network.text_length}."
            )
        if target.startswith(OURS) and embedder.get("is_trainable"):
            raise ConfigError(
                f"{where}.is_trainable: true, but {target} does not train; set it to false, or name CogVideo's "
                "own target."
            )


def _check_length(bucket: Bucket, network: Network, joint: bool) -> None:
    latents, step = latent_frames(bucket.frames), network.patch[0]
    found = f"{_FRAMES}: {bucket.frames} frames are {latents} latent frames, and this model"
    if latents % step and not joint:
        below = latents // step * step
        lengths = [pixel_frames(n) for n in (below, below + step) if n]
        raise ConfigError(
            f"{found} takes multiples of {step}; name {LOSS} in model.loss_fn_config.target, which pads them, or "
            f"use {' or '.join(map(str, lengths))}."
        )
    if network.num_frames is None or (network.position.startswith(OURS) and not network.is_learned):
        return  # our positions are computed for any length, unless the model has learned some
    most = latent_frames(network.num_frames) * step
    if latents > most:
        raise ConfigError(
            f"{found} has positions for {most} (num_frames in model.network_config.params); use "
            f"{pixel_frames(most)} or less."
        )


def _check_size(bucket: Bucket, network: Network) -> None:
    if network.latent_height is None or network.latent_width is None:
        return
    rows, columns = bucket.height // LATENT_SIDE, bucket.width // LATENT_SIDE
    known = f"{network.latent_height * LATENT_SIDE}x{network.latent_width * LATENT_SIDE}"
    if network.generation == "1.5":  # cuts the input's part out of its table, at any size that the table covers
        larger = rows > network.latent_height or columns > network.latent_width
        if larger and not network.position.startswith(OURS):
            raise ConfigError(
                f"bucket {bucket}: this model has positions for {known} pixels (latent_height and latent_width in "
                "model.network_config.params); use a smaller size."
            )
        return
    fixed = [t for t in (network.position, network.final_layer) if not t.startswith(OURS)]
    if fixed and (rows, columns) != (network.latent_height, network.latent_width):
        raise ConfigError(
            f"bucket {bucket}: {fixed[0] or 'this network'} is right at {known} pixels only; use that size, or "
            "append configs/cogvideo/sizes-2b.yaml or sizes-5b.yaml, according to the model."
        )


def _generation_of_checkout(network: Network) -> str | None:
    """Of the network class that the run will build; None for a class that is not CogVideo's."""
    module, _, name = network.target.rpartition(".")
    if (module, name) != ("dit_video_concat", "DiffusionTransformer"):
        return None
    try:
        built = getattr(import_module(module), name)
    except ImportError:  # its own script reports what is missing
        return None
    # new in 1.5; 1.0 would pass it on to SAT
    return "1.5" if "ofs_embed_dim" in inspect.signature(built.__init__).parameters else "1.0"
