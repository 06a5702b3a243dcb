"""A module as one other module sees it."""

from __future__ import annotations

import types
from typing import Any


class StandIn(types.ModuleType):
    """`module` with `changes` in the place of its own names; everybody else's `module` is untouched."""

    def __init__(self, module: types.ModuleType, **changes: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
