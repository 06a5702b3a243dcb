"""The class of CogVideo's that a target stands for: found by name when the target is called, and subclassed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

from sat_ext.config import reject_unknown_keys
from sat_ext.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def subclass_of(
    target: type[M], parent: str, params: Mapping[str, Any], *, methods: Sequence[str], where: str
) -> type[M]:
    """A class of `target`'s behaviour over that of the class named `parent`, whose parameters and names it keeps.

    `params` are all keyword arguments of the new object, `methods` what `target` calls in the parent, and `where`
    is the place in the YAML. Raises `ConfigError` where the parent cannot be imported or is of another sort, and
    where a parameter is neither the target's nor the parent's.
    """
    base = import_class(parent, f"{where}.parent")
    for method in methods:
        if not callable(getattr(base, method, None)):
            raise ConfigError(
                f"{where}.parent: {parent} has no {method}, so {target.__name__} cannot stand for it; name the "
                "class that CogVideo's own YAML has there."
            )
    made = type(target.__name__, (target, base), {"__module__": target.__module__, "__doc__": target.__doc__})
    reject_unknown_keys(params, accepted(made), where)
    return made


def import_class(name: str, where: str, kind: type = nn.Module) -> Any:
    """The class of this dotted name, of the `kind` that is wanted; `ConfigError` where there is none."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {name} cannot be imported ({error}); run CogVideo's own train_video.py in its sat folder."
        ) from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        sort = "module class" if kind is nn.Module else "class"
        raise ConfigError(f"{where}: {name} is no {sort}; name the one that CogVideo's own YAML has there.")
    return found


def accepted(cls: type) -> list[str]:
    """Names of the parameters that `cls` takes: its own, and those that it hands on as keywords.

    >>> class Parent:
    ...     def __init__(self, size): ...
    >>> class Child(Parent):
    ...     def __init__(self, *, factor=1, **params): ...
    >>> accepted(Child)
    ['factor', 'size']
    """
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
