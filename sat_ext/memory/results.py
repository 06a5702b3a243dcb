"""Measurements that this process or an earlier one made, so that a plan is a matter of arithmetic."""

import hashlib
import json
import logging
import typing
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sat_ext.config import convert
from sat_ext.errors import ConfigError
from sat_ext.files.atomic import cache_folder, written_aside

P = ParamSpec("P")
T = TypeVar("T")

# A change of what is measured, or of what measures, makes all earlier results invalid.
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
SOURCES = ("models/*.py", "memory/*.py", "cogvideox.py")
log = logging.getLogger(__name__)


def remembered(measure: Callable[P, T]) -> Callable[P, T]:
    """`measure`, whose results are kept in `$SAT_EXT_CACHE` (else `~/.cache/sat_ext`), a file each.

    The `repr` of its arguments must be complete, and its result a dataclass or an integer."""
    known: dict[str, T] = {}

    @wraps(measure)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
        key = repr((measure.__name__, args, kwargs))
        if key not in known:
            name = hashlib.sha256((_fingerprint() + key).encode()).hexdigest()[:32]
            file = cache_folder() / "memory" / f"{name}.json"
            found = _read(file, typing.get_type_hints(measure)["return"])
            if found is None:
                found = measure(*args, **kwargs)
                _write(file, found)
            known[key] = found
        return known[key]

    return look_up


def _read(file: Path, hint: Any) -> Any:
    try:
        return convert(hint, json.loads(file.read_text(encoding="utf-8")), str(file))
    except (OSError, ValueError, ConfigError):  # missing or damaged: measure again
        return None


def _write(file: Path, found: Any) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(file, shared=True) as draft:
            draft.write_text(json.dumps(found if isinstance(found, int) else asdict(found)), encoding="utf-8")
    except OSError as error:
        log.info("%s: the measurement cannot be kept for the next time (%s)", file, error)


@cache
def _fingerprint() -> str:
    found = hashlib.sha256(" ".join(map(version, LIBRARIES)).encode())
    root = Path(__file__).parents[1]
    for pattern in SOURCES:
        for file in sorted(root.glob(pattern)):
            found.update(file.read_bytes())
    return found.hexdigest()
