"""The base of our YAML targets: each extends a class of CogVideo's, found by name when the target is called."""

import inspect
from typing import Any, ClassVar

from torch import nn

from sat_ext.config import import_named, reject_unknown_keys
from sat_ext.errors import ConfigError


class Target:
    """A class that CogVideo's `instantiate_from_config` can call, which extends the class named `parent`.

    Its objects are of a class made of this one and the parent: they take the parent's parameters, pass its
    `isinstance` checks, and name their weights as it does. Raises `ConfigError` where the parent cannot be
    imported or lacks a method, and for a parameter that neither of them takes."""

    PARENT: ClassVar[str]  # the class of CogVideo's that is extended where the YAML names no `parent`
    WHERE: ClassVar[str]  # the place of the parameters in the YAML
    CALLS: ClassVar[tuple[str, ...]] = ()  # methods of the parent that the target calls or replaces
    is_extended: ClassVar[bool] = False

    def __new__(cls, *, parent: str | None = None, **params: Any) -> Any:
        """An object of a class made of this one and the parent."""
        if cls.is_extended:  # for `copy.deepcopy`, which gives no parameters
            return super().__new__(cls)
        # here and not at import: only now is the YAML's `parent` known, and CogVideo's code sure to be importable
        name = parent or cls.PARENT
        base = import_class(name, f"{cls.WHERE}.parent", nn.Module if issubclass(cls, nn.Module) else object)
        for method in cls.CALLS:
            if not callable(getattr(base, method, None)):
                raise ConfigError(
                    f"{cls.WHERE}.parent: {name} has no {method}, so {cls.__name__} cannot extend it; name the "
                    "class that CogVideo's own YAML has there."
                )
        own = {"__module__": cls.__module__, "__doc__": cls.__doc__, "is_extended": True}
        made: Any = type(cls.__name__, (cls, base), own)
        reject_unknown_keys(params, accepted(made), cls.WHERE)
        return super().__new__(made)

    def __init__(self, *, parent: str | None = None, **params: Any) -> None:
        super().__init__(**params)


def import_class(name: str, where: str, kind: type = nn.Module) -> Any:
    """The class of this dotted name, a subclass of `kind`; `ConfigError` where there is none."""
    found = import_named(name, f"{where}: {name}", "run CogVideo's own train_video.py in its sat folder.")
    if not (isinstance(found, type) and issubclass(found, kind)):
        sort = "module class" if kind is nn.Module else "class"
        raise ConfigError(f"{where}: {name} is not a {sort}; name the one that CogVideo's own YAML has there.")
    return found


def accepted(cls: type) -> list[str]:
    """Names of the parameters that `cls` takes: its own, and those that it passes on as keywords.

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
