"""The lists of data in `args`, looked at before SAT builds any: it counts and divides by what is in them."""

import argparse

from sat_ext.config import plain
from sat_ext.recipe import LISTS, nothing_to_train_on, paths_of


def fill_in(args: argparse.Namespace) -> None:
    """An entry for `data.params.sources`, and None for a list that is empty. Raises `ConfigError`."""
    for name in LISTS:
        setattr(args, name, paths_of(vars(args), name) or None)
    params = plain(getattr(args, "data_config", None)).get("params") or {}
    if not args.train_data and params.get("sources"):
        args.train_data = ["data.params.sources"]  # SAT builds a data set for each entry, and none without any
    if not args.train_data:
        raise nothing_to_train_on()
