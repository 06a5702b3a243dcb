"""Replace a module for one of its users, or a function for a while."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StandIn(types.ModuleType):
    """`module` as one other module sees it: with `changes` in place of its own names."""

    def __init__(self, module: types.ModuleType, **changes: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner.name` is `value`."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
