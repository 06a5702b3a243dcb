"""The data set registry: SAT's own `Registry` class, open to other packages.

A package adds a class by an entry point in the group `sat_ext.datasets`, whose name is the registered name:

    [project.entry-points."sat_ext.datasets"]
    MyDataset = "my_package.data:MyDataset"

or with the decorator: `@dataset_registry.register`.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sat.model.registry import Registry

from sat_ext.errors import ConfigError

ENTRY_POINT_GROUP = "sat_ext.datasets"
dataset_registry = Registry("sat_ext_datasets")


def get_dataset(name: str) -> Any:
    """The data set class of that name: registered, or an installed package's entry point.

    Raises `ConfigError` when nothing has that name, and where the package fails to load.
    """
    if name not in dataset_registry.member:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                dataset_registry.member.setdefault(name, _load(point))
    if name not in dataset_registry.member:
        known = sorted({*dataset_registry.member, *(p.name for p in entry_points(group=ENTRY_POINT_GROUP))})
        raise ConfigError(f"data.target: no data set is called '{name}'; registered: {', '.join(known)}.")
    return dataset_registry.member[name]


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # whatever another package's import raises
        raise ConfigError(
            f"data.target: '{point.name}' cannot be loaded from '{point.value}' ({type(error).__name__}: "
            f"{error}); fix or remove that package."
        ) from error
