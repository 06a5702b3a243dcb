"""A configuration as commented YAML."""

from collections.abc import Mapping
from typing import Any

import yaml

_COLUMN = 34  # where comments begin, if the line is shorter


def render(config: Mapping[str, Any], comments: Mapping[str, str], heading: str) -> str:
    """`config` as YAML under `heading`; `comments` are by dotted path.

    >>> config = {"args": {"save": "runs/a"}, "data": {"params": {"fps": 8}}}
    >>> print(render(config, {"data.params.fps": "why"}, "A run."))
    # A run.
    args:
      save: runs/a
    data:
      params:
        fps: 8                        # why
    <BLANKLINE>
    """
    lines = [f"# {line}" for line in heading.splitlines()]
    _add(lines, config, comments, "", 0)
    return "\n".join(lines) + "\n"


def _add(lines: list[str], part: Mapping[str, Any], comments: Mapping[str, str], where: str, depth: int) -> None:
    for key, value in part.items():
        path, indent = f"{where}{key}", "  " * depth
        inner = isinstance(value, dict) and value and (depth == 0 or _is_nested(value, comments, f"{path}."))
        line = f"{indent}{key}:" + ("" if inner else f" {_flow(value)}")
        comment = comments.get(path)
        lines.append(f"{line:<{_COLUMN - 2}}  # {comment}" if comment else line)
        if inner:
            _add(lines, value, comments, f"{path}.", depth + 1)


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n...\n").strip()


def _is_nested(value: Mapping[str, Any], comments: Mapping[str, str], where: str) -> bool:
    """Whether a mapping is too much for one line."""
    commented = any(path.startswith(where) for path in comments)
    return commented or len(value) > 4 or any(isinstance(v, (dict, list)) for v in value.values())
