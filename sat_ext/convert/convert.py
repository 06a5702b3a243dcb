"""The conversions: what `sat-ext convert` and `sat-ext export` do."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sat_ext.convert.lora import Lora
from sat_ext.convert.parts import ConvertOptions
from sat_ext.convert.read import read_autoencoder, read_transformer
from sat_ext.convert.write import Tracking, write_diffusers, write_sat_autoencoder, write_sat_transformer
from sat_ext.errors import ConfigError

WRITE_SAT = {"transformer": write_sat_transformer, "vae": write_sat_autoencoder}
PARTS = tuple(WRITE_SAT)


@dataclass(frozen=True)
class Converted:
    """What was written, its LoRA, and what else the source held."""

    written: list[Path]
    lora: Lora | None
    left_out: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    to: Literal["diffusers", "sat"],
    parts: Collection[str],
    options: ConvertOptions,
    tracking: Tracking,
) -> Converted:
    """Write those of `parts` that `source` holds into `target`, as `transformer/`, `vae/` and the LoRA's file.

    Raises `ConfigError` where `source` holds none or has the layout `to` already, where `target` lies inside a
    part, and for what cannot be converted exactly; then nothing of that part is left in `target`.
    """
    _reject_inside(target, source)
    options = replace(options, to=to)
    found = [read_transformer(source, options)] if "transformer" in parts else []
    found += [read_autoencoder(source, options)] if "vae" in parts else []
    held = [part for part in found if part is not None]
    if not held:
        raise ConfigError(
            f"{source}: holds no {' and no '.join(parts)} of CogVideoX; SAT's layout has transformer/latest and "
            "vae/3d-vae.pt, diffusers' has transformer/config.json and vae/config.json."
        )
    written = []
    for part in held:
        write = write_diffusers if to == "diffusers" else WRITE_SAT[part.name]
        written += write(part, target / part.name, tracking)
    loras = [part.lora for part in held if part.lora is not None]
    left_out = tuple(name for part in held for name in part.left_out)
    return Converted(written, loras[0] if loras else None, left_out)


def export(source: Path, target: Path, options: ConvertOptions, tracking: Tracking) -> Converted:
    """A run's LoRA as the file that diffusers loads; of one that trained all weights, the transformer's folder."""
    _reject_inside(target, source)
    part = read_transformer(source, replace(options, with_base=False))
    if part is None:
        raise ConfigError(f"{source}: holds no transformer and no LoRA; name a run's folder or a checkpoint.")
    return Converted(write_diffusers(part, target / "transformer", tracking), part.lora, part.left_out)


def _reject_inside(target: Path, source: Path) -> None:
    """A `transformer/` inside a part would from then on be read in its place."""
    parts = [source / name for name in PARTS if (source / name).is_dir()]
    own = source.parent.parent if source.is_file() else source
    inside = [part for part in parts if target.resolve().is_relative_to(part.resolve())]
    if any((own / name).is_file() for name in ("latest", "config.json")) and target.resolve() == own.resolve():
        inside.append(own)  # a part itself, or a run
    if inside:
        raise ConfigError(
            f"-o: {target} is a part of the source, or lies in one ({inside[0]}); name another folder."
        )
