"""A run's cache, looked at before its first step: nothing that is stale or missing is trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sat_ext.data.index import Index
from sat_ext.data.params import DataConfig
from sat_ext.errors import DataError
from sat_ext.latents.encoders import Fingerprints
from sat_ext.latents.reader import Cached, media_codes
from sat_ext.latents.store import CacheConfig, LatentStore
from sat_ext.latents.text import TextEmbeddings, caption_key
from sat_ext.recipe import Recipe
from sat_ext.sat.broadcast import share_from_first_rank

COMMAND = "'sat-ext cache --base ...' with the YAML files of this run"


def open_cache(args: argparse.Namespace, recipe: Recipe, index: Index, split: str) -> Cached | None:
    """The cache that `data.params.cache` names, for one list of data; None where it names none.

    Raises `ConfigError` where model and cache do not go together, and `DataError`, on every rank, where the cache
    lacks something that this run can ask for.
    """
    engine, config = recipe.engine, recipe.data
    engine.check_cache(args, is_cached=config.cache is not None)
    if config.cache is None:
        return None
    prints = engine.fingerprints(recipe.dtype)
    store = LatentStore(Path(config.cache.folder))
    draws = split == "train_data"
    conditions = engine.is_conditioned

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
        as_pixels=engine.takes_latents_as_pixels,
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
