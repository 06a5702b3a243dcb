"""YAML files, and strict loading of their values into frozen dataclasses: an unknown key is an error."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sat_ext.errors import ConfigError

T = TypeVar("T")

SECTIONS = ("args", "model", "data", "deepspeed")
INTERNAL = {"internal": True}  # metadata of a dataclass field that the program sets, not the YAML


def read_yaml(paths: Sequence[str]) -> dict[str, Any]:
    """Merge the YAML files, the later over the earlier, into plain dicts and lists. Raises `ConfigError` if a file
    is missing, is not YAML, or has an unknown section."""
    if not paths:
        raise ConfigError("--base: no YAML was given; e.g. --base configs/model/tiny.yaml configs/data/demo.yaml.")
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
        return plain(OmegaConf.merge(*parts))
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list in place of another file's mapping
        files = " and ".join(paths)
        raise ConfigError(f"--base: {files} do not merge: {' '.join(str(error).split())}") from error


def plain(section: Any) -> dict[str, Any]:
    """A section as dicts and lists, without OmegaConf's containers, in which CogVideo's script passes its YAML."""
    found = OmegaConf.to_container(OmegaConf.create(section or {}), resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """A question with the nearest of the `known` names, or "" if none is near."""
    near = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f"did you mean '{near[0]}'?" if near else ""


def reject_unknown_keys(keys: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise `ConfigError` for the first of `keys` that is not in `known`, naming the nearest valid one."""
    for key in keys:
        if key not in known:
            hint = did_you_mean(key, known) or f"valid keys: {', '.join(sorted(known))}."
            raise ConfigError(f"{where}: unknown key '{key}'; {hint}")


def import_named(name: str, shown: str, remedy: str) -> Any:
    """What has this dotted path. Raises `ConfigError` about the place and name `shown` where nothing has."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # the latter two: no path at all
        raise ConfigError(f"{shown} cannot be imported ({error}); {remedy}") from error


def load_entry(point: EntryPoint, where: str) -> Any:
    """What another package offers by an entry point. Raises `ConfigError` that begins with `where`."""
    try:
        return point.load()
    except Exception as error:  # another package's import may raise anything
        found = f"'{point.name}' cannot be loaded from '{point.value}' ({type(error).__name__}: {error})"
        raise ConfigError(f"{where}: {found}; fix or remove that package.") from error


def load(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `mapping`, whose YAML path is `where` ("data.params").

    Fields may be nested dataclasses, `X | None`, `tuple[X, ...]`, fixed tuples, `Literal`, `dict[K, V]` and
    scalars. Those with the metadata `INTERNAL` cannot be set. Raises `ConfigError` with the path, the value and
    the remedy.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Fps:
    ...     fps: int = 8
    >>> load(Fps, {"fps": 16}, "data.params")
    Fps(fps=16)
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys, got {mapping!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata != INTERNAL}  # type: ignore[arg-type]
    reject_unknown_keys(mapping, list(fields), where)
    hints = typing.get_type_hints(cls)
    values = {k: convert(hints[k], v, f"{where}.{k}") for k, v in mapping.items()}
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: '{name}' is missing; add it.")
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
            near = did_you_mean(value, args)
            valid = ", ".join(map(str, args)) + (f" ({near})" if near else "")
            raise ConfigError(f"{where}: {value!r} is not one of {valid}.")
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
    # A mapping is converted to mappings only, so that the error is about the option that the user meant.
    mappings = tuple(o for o in options if dataclasses.is_dataclass(o) or typing.get_origin(o) is dict)
    alike = mappings if isinstance(value, Mapping) else tuple(o for o in options if o not in mappings)
    errors = []
    for option in alike or options:
        try:
            return convert(option, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


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
