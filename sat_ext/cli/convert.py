"""`sat-ext convert`: weights from SAT's layout to diffusers' and back."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sat_ext.cli.base import MoreYaml
from sat_ext.config import read_yaml
from sat_ext.errors import ConfigError
from sat_ext.types import Bucket

if TYPE_CHECKING:
    from sat_ext.convert.convert import Converted
    from sat_ext.convert.parts import ConvertOptions

OutputOption = Annotated[Path, typer.Option("-o", "--output", help="the folder to write into")]
YamlOption = Annotated[
    list[str] | None,
    typer.Option(
        "--base", metavar="YAML...", help="CogVideo's YAML files of the model, merged from left to right"
    ),
]
AlphaOption = Annotated[float | None, typer.Option(help="lora_alpha of the run, over 0, if no YAML gives it")]
EmaOption = Annotated[bool, typer.Option("--ema", help="take the averaged weights of the checkpoint")]
SizeOption = Annotated[
    str | None, typer.Option(help="frames x height x width in pixels that the model is for, such as 49x480x720")
]


def convert(
    source: Annotated[
        Path, typer.Argument(help="a model's folder, one of its parts, a checkpoint, or a LoRA's file")
    ],
    output: OutputOption,
    to: Annotated[Literal["diffusers", "sat"], typer.Option(help="the layout to write")],
    part: Annotated[
        Literal["transformer", "vae"] | None, typer.Option(help="which part; default: those that are there")
    ] = None,
    base: YamlOption = None,
    base_weights: Annotated[
        Path | None, typer.Option(help="for a checkpoint that holds a LoRA alone: the weights that it belongs to")
    ] = None,
    size: SizeOption = None,
    scale_factor: Annotated[
        float | None, typer.Option(help="of the autoencoder's latents; default: the YAML's")
    ] = None,
    alpha: AlphaOption = None,
    merge: Annotated[bool, typer.Option("--merge", help="add the LoRA to its base weights")] = False,
    ema: EmaOption = False,
    more: MoreYaml = None,
) -> None:
    """Convert CogVideoX weights between SAT's layout and diffusers', bit for bit."""
    # here, because diffusers takes seconds to import, which would slow down the other subcommands
    from sat_ext.convert import convert as conversions

    given = {
        "scale_factor": scale_factor, "alpha": alpha, "base_weights": base_weights, "merge": merge, "ema": ema,
    }  # fmt: skip
    options = make_options(source, base, more, size, **given)
    done = conversions.convert(source, output, to, (part,) if part else tuple(conversions.READERS), options)
    report(done)
    if to == "sat" and done.lora is not None:
        yaml = output / "transformer" / "lora.yaml"
        print(f"append {yaml} to CogVideo's --base: rank {done.lora.rank}, alpha {done.lora.sat_alpha}")


def make_options(
    source: Path, base: list[str] | None, more: list[str] | None, size: str | None, **given: Any
) -> "ConvertOptions":
    """The options as the conversions take them; `more`: of `--base a.yaml b.yaml` all but the first file, which
    arrive as arguments after the source. Raises `ConfigError`."""
    from sat_ext.convert.parts import ConvertOptions

    if more and not base:
        raise ConfigError(f"{more[0]}: only one source is taken at a time; YAML files go after --base.")
    if base and source.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{source}: is taken for the source; name the source before --base.")
    for name, value in given.items():
        if isinstance(value, float) and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"--{name.replace('_', '-')}: {value:g} is not a scale; use a number above 0.")
    yaml = read_yaml([*base, *(more or [])]) if base else None
    return ConvertOptions(base=yaml, size=None if size is None else _size(size), **given)


def _size(text: str) -> Bucket:
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ConfigError(f"--size: {text!r} is not frames x height x width in pixels; write it like 49x480x720.")
    frames, height, width = (int(n) for n in numbers)
    return Bucket(frames=frames, height=height, width=width)


def report(done: "Converted") -> None:
    """Print what was written, and what was left out."""
    for path in done.written:
        files = path.rglob("*") if path.is_dir() else [path]
        print(f"{path}: {sum(f.stat().st_size for f in files if f.is_file()) / 1e6:,.1f} MB")
    if done.left_out:
        print(f"left out, as no part of the transformer: {', '.join(done.left_out)}")
