"""Measurements that were made before, in this process or another: a plan is then a matter of arithmetic."""

import hashlib
import json
import logging
import typing
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sat_ext.config import convert
from sat_ext.errors import ConfigError
from sat_ext.files.atomic import cache_folder, written_aside

P = ParamSpec("P")
T = TypeVar("T")

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
# What is measured and what measures. A change of either makes all earlier results another's.
SOURCES = ("models/*.py", "memory/*.py", "cogvideox.py")
log = logging.getLogger(__name__)


def remembered(measure: Callable[P, T]) -> Callable[P, T]:
    """`measure`, whose results are kept in `$SAT_EXT_CACHE` (else `~/.cache/sat_ext`), a file each.

    Its arguments have a `repr` that says all of them, and its result is a dataclass or a number.
    """
    known: dict[str, T] = {}

    @wraps(measure)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> T:
        key = repr((measure.__name__, args, kwargs))
        if key not in known:
            name = hashlib.sha256((_fingerprint() + key).encode()).hexdigest()[:32]
            place = cache_folder() / "memory" / f"{name}.json"
            hint = typing.get_type_hints(measure)["return"]
            if (found := _read(place, hint)) is None:
                found = measure(*args, **kwargs)
                _write(place, found)
            known[key] = found
        return known[key]

    return look_up


def _read(place: Path, hint: Any) -> Any:
    try:
        return convert(hint, json.loads(place.read_text(encoding="utf-8")), str(place))
    except (OSError, ValueError, ConfigError):  # not there, or not whole: it is measured again
        return None


def _write(place: Path, found: Any) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(place, shared=True) as draft:
            draft.write_text(json.dumps(found if isinstance(found, int) else asdict(found)), encoding="utf-8")
    except OSError as error:
        log.info("%s: what was measured cannot be kept for the next time (%s)", place, error)


@cache
def _fingerprint() -> str:
    found = hashlib.sha256()
    for library in LIBRARIES:
        found.update(f"{library} {_version(library)};".encode())
    root = Path(__file__).parents[1]
    for pattern in SOURCES:
        for file in sorted(root.glob(pattern)):
            found.update(file.read_bytes())
    return found.hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
