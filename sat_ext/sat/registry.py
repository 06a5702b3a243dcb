"""The data set registry: SAT's own `Registry` class, open to other packages.

A package adds a class by an entry point in the group `sat_ext.datasets`, whose name is the registered name:

    [project.entry-points."sat_ext.datasets"]
    MyDataset = "my_package.data:MyDataset"

or with the decorator: `@dataset_registry.register`."""

from importlib.metadata import entry_points
from typing import Any

from sat.model.registry import Registry

from sat_ext.config import load_entry
from sat_ext.errors import ConfigError

ENTRY_POINT_GROUP = "sat_ext.datasets"
dataset_registry = Registry("sat_ext_datasets")


def get_dataset(name: str) -> Any:
    """The data set class of that name: registered, or an installed package's entry point. Raises `ConfigError`."""
    registered = dataset_registry.member
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in registered:
        return registered[name]
    if name not in points:
        known = ", ".join(sorted({*registered, *points}))
        raise ConfigError(f"data.target: no data set is called '{name}'; registered: {known}.")
    return load_entry(points[name], "data.target")
