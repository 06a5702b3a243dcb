"""YAML files, and strict loading of their values into frozen dataclasses: an unknown key is an error."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sat_ext.errors import ConfigError

T = TypeVar("T")

SECTIONS = ("args", "model", "data", "deepspeed")


def read_yaml(paths: Sequence[str]) -> dict[str, Any]:
    """Merge the YAML files, the later over the earlier, into plain dicts and lists.

    Raises `ConfigError` when a file is missing, is not YAML, or has an unknown section.
    """
    if not paths:
        raise ConfigError(
            "--base: no YAML was given; for example --base configs/model/tiny.yaml configs/data/demo.yaml."
        )
    parts = []
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"--base: there is no file {path} (looked from {Path.cwd()}).")
        try:
            part = OmegaConf.load(path)
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        if not OmegaConf.is_dict(part):
            raise ConfigError(f"{path}: expected sections ({', '.join(SECTIONS)}), got {type(part).__name__}.")
        reject_unknown_keys([str(k) for k in part], SECTIONS, path)
        parts.append(part)
    try:
        merged = OmegaConf.to_container(OmegaConf.merge(*parts), resolve=True)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list in place of another file's mapping
        files = " and ".join(paths)
        raise ConfigError(f"--base: {files} do not merge: {' '.join(str(error).split())}") from error
    assert isinstance(merged, dict)
    return {str(k): v for k, v in merged.items()}


def plain(section: Any) -> dict[str, Any]:
    """Dicts and lists of a section, which may be None (empty) or hold OmegaConf's containers: CogVideo's script
    hands its YAML over as these."""
    if not section:
        return {}
    found = OmegaConf.to_container(OmegaConf.create(section), resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def reject_unknown_keys(keys: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise `ConfigError` for the first of `keys` that is not in `known`, naming the nearest valid one."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(sorted(known))}."
            raise ConfigError(f"{where}: unknown key '{key}'; {hint}")


def load(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `mapping`.

    Nested dataclasses, `X | None`, `tuple[X, ...]`, fixed tuples, `Literal`, `dict[K, V]` and scalars are
    understood. `where` is the YAML path for messages ("data.params"). Raises `ConfigError` with the path,
    the value and the remedy.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Fps:
    ...     fps: int = 8
    >>> load(Fps, {"fps": 16}, "data.params")
    Fps(fps=16)
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, got {mapping!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    reject_unknown_keys(mapping, list(fields), where)
    hints = typing.get_type_hints(cls)
    values = {k: convert(hints[k], v, f"{where}.{k}") for k, v in mapping.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: '{missing[0]}' is missing; add it.")
    return cls(**values)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for, or a `ConfigError` that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f" (did you mean '{near[0]}'?)" if near else ""
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}{hint_text}.")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else load(hint, value, where)  # type: ignore[arg-type]
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}.")
        return {convert(args[0], k, where): convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    # a message about the option that the value looks like helps more than one about the first
    alike = [
        o
        for o in options
        if isinstance(value, Mapping) == (dataclasses.is_dataclass(o) or typing.get_origin(o) is dict)
    ]
    options = tuple(alike) or options
    first_error: ConfigError | None = None
    for option in options:
        try:
            return convert(option, value, where)
        except ConfigError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _convert_sequence(origin: type, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{where}: expected a list, got {value!r}.")
    fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
    if fixed and len(value) != len(args):
        raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}: {list(value)!r}.")
    kinds = args if fixed else (args[0],) * len(value)
    return origin(convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value)))


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # CogVideo's own YAMLs write `skip_frms_num: 3.`
    if hint in (int, float) and isinstance(value, str):
        try:
            return hint(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            pass
    if isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}.")
