"""A run's cache, looked at before its first step: nothing that is stale or missing is trained on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sat import mpu

from sat_ext.cogvideo.network import CACHED_FIRST_STAGE, LOSS, is_conditioned
from sat_ext.data.index import Index
from sat_ext.data.params import DataConfig
from sat_ext.errors import ConfigError, DataError
from sat_ext.latents.encoders import Fingerprints
from sat_ext.latents.reader import Cached, media_codes
from sat_ext.latents.store import CacheConfig, LatentStore
from sat_ext.latents.text import TextEmbeddings, caption_key
from sat_ext.sat.shared import share_from_first_rank

COMMAND = "'sat-ext cache --base ...' with the YAML files of this run"


def open_cache(
    args: argparse.Namespace, config: DataConfig, model: Mapping[str, Any], index: Index, split: str
) -> Cached | None:
    """The cache that `data.params.cache` names, for one list of data; None where it names none.

    Raises `ConfigError` where model and cache do not go together, and `DataError`, on every rank, where the cache
    lacks something that this run can ask for.
    """
    of_cogvideo = "network_config" in model
    first_stage = (model.get("first_stage_config") or {}).get("target") if of_cogvideo else None
    if config.cache is None:
        if first_stage == CACHED_FIRST_STAGE:
            raise ConfigError(
                f"model.first_stage_config.target: {CACHED_FIRST_STAGE} takes latents; set "
                "data.params.cache.folder to what sat-ext cache wrote."
            )
        return None
    if of_cogvideo:
        _check_cogvideo(args, model, first_stage)
    prints = _fingerprints(model, args)
    store = LatentStore(Path(config.cache.folder))
    draws = split == "train_data"
    conditions = is_conditioned(model) if of_cogvideo else model.get("conditioning") == "i2v"

    def look() -> np.ndarray:
        media = media_codes(index)
        cached = Cached(
            store=store, config=cache, media=media, encoder=prints.first_stage, draws=draws, conditions=conditions
        )
        _check(cached, index, config, prints)
        return media

    cache: CacheConfig = config.cache
    media = share_from_first_rank(look)
    return Cached(
        store=store, config=cache, media=media, encoder=prints.first_stage, draws=draws, conditions=conditions,
        as_pixels=of_cogvideo,
    )  # fmt: skip


def _check(cached: Cached, index: Index, config: DataConfig, prints: Fingerprints) -> None:
    folder = cached.store.folder
    cached.store.require([entry for _, entry in cached.wanted(index, config)], COMMAND)
    text = TextEmbeddings(folder)
    text.require(prints.text, f"run {COMMAND} into another folder")
    captions = dict.fromkeys(c for of_row in index.table["captions"].to_pylist() for c in of_row)
    missing = [c for c in ("", *captions) if caption_key(c) not in text.files]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(captions) + 1} captions are not in this cache (first: "
            f"{missing[0][:80]!r}); run {COMMAND}."
        )


def _check_cogvideo(args: argparse.Namespace, model: Mapping[str, Any], first_stage: str | None) -> None:
    if first_stage != CACHED_FIRST_STAGE:
        raise ConfigError(
            f"data.params.cache: CogVideo's engine takes latents through model.first_stage_config.target: "
            f"{CACHED_FIRST_STAGE}, and the YAML has {first_stage}; append configs/cogvideo/cached.yaml."
        )
    loss = (model.get("loss_fn_config") or {}).get("target")
    if is_conditioned(model) and loss != LOSS:
        raise ConfigError(
            f"data.params.cache: the cached condition goes through model.loss_fn_config.target: {LOSS}, and the "
            f"YAML has {loss}; append configs/cogvideo/joint.yaml."
        )
    if mpu.get_model_parallel_world_size() > 1:
        raise ConfigError(
            "data.params.cache: CogVideo's script does not hand cached conditions to ranks that share a model; "
            "set args.model_parallel_size: 1."
        )
    if args.eval_interval:
        raise ConfigError(
            f"args.eval_interval: {args.eval_interval}, but CogVideo's evaluations decode samples, and a run from "
            "data.params.cache has no first stage; set it to null."
        )


def _fingerprints(model: Mapping[str, Any], args: argparse.Namespace) -> Fingerprints:
    dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    if "network_config" in model:
        from sat_ext.cogvideo.cogvideo_encoders import fingerprints

        return fingerprints(model, dtype)
    from sat_ext.models.engine_encoders import fingerprints as own  # and diffusers

    return own(model, dtype)
