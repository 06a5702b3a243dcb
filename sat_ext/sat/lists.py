"""The lists of data in `args`, looked at before SAT builds any: it counts and divides by what is in them."""

from __future__ import annotations

import argparse

from sat_ext.errors import ConfigError

SPLITS = ("train_data", "valid_data", "test_data")


def fill_in(args: argparse.Namespace) -> None:
    """An entry for `data.params.sources`, and None for a list that is empty. Raises `ConfigError`."""
    for split in SPLITS:
        paths = getattr(args, split, None)
        if isinstance(paths, str):
            raise ConfigError(f'args.{split}: {paths!r} is one text, and a list is wanted; write ["{paths}"].')
        setattr(args, split, paths or None)
    if not args.train_data and ((getattr(args, "data_config", None) or {}).get("params") or {}).get("sources"):
        args.train_data = ["data.params.sources"]  # SAT builds a data set for each entry, and none without any
    if not args.train_data:
        raise ConfigError(
            "args.train_data: nothing to train on; name a folder or table, or set data.params.sources."
        )
