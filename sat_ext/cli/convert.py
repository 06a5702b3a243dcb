"""`sat-ext convert`: weights from SAT's layout to diffusers' and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

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
AlphaOption = Annotated[float | None, typer.Option(help="lora_alpha of the run, over 0, where no YAML tells it")]
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
    more: MoreYaml = None,
) -> None:
    """Convert CogVideoX weights between SAT's layout and diffusers', bit for bit."""
    # here, because diffusers takes seconds to import, which the other subcommands shall not
    from sat_ext.convert import convert as conversions

    options = make_options(yaml_files(source, base, more), size, scale_factor, alpha, base_weights)
    with progress() as tracking:
        parts = (part,) if part else conversions.PARTS
        done = conversions.convert(source, output, to, parts, options, tracking)
    report(done)
    if to == "sat" and done.lora is not None:
        yaml = output / "transformer" / "lora.yaml"
        print(f"append {yaml} to CogVideo's --base: rank {done.lora.rank}, alpha {done.lora.alpha}")


def yaml_files(source: Path, base: list[str] | None, more: list[str] | None) -> list[str] | None:
    """The files of `--base a.yaml b.yaml`, of which all but the first arrive as arguments after the source."""
    if more and not base:
        raise ConfigError(f"{more[0]}: only one source is taken at a time; YAML files go after --base.")
    if base and source.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{source}: is taken for the source; name the source before --base.")
    return [*base, *(more or [])] if base else None


def make_options(
    base: list[str] | None,
    size: str | None = None,
    scale_factor: float | None = None,
    alpha: float | None = None,
    base_weights: Path | None = None,
) -> ConvertOptions:
    """The options as the conversions take them. Raises `ConfigError` for a size or a number that is none."""
    from sat_ext.convert.parts import ConvertOptions

    for name, value in (("--alpha", alpha), ("--scale-factor", scale_factor)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}: {value:g} is not a scale; use a number above 0.")
    return ConvertOptions(
        base=read_yaml(base) if base else None,
        size=None if size is None else _size(size),
        scale_factor=scale_factor,
        alpha=alpha,
        base_weights=base_weights,
    )


def _size(text: str) -> Bucket:
    numbers = text.lower().split("x")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ConfigError(f"--size: {text!r} is not frames x height x width in pixels; write it like 49x480x720.")
    frames, height, width = (int(n) for n in numbers)
    return Bucket(frames=frames, height=height, width=width)


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar for each thing that is written, on the error stream where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def tracking(name: str, size: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=size)
            return lambda written: bars.advance(task, written)

        yield tracking


def report(done: Converted) -> None:
    """Say what was written, and what was left."""
    for path in done.written:
        files = path.rglob("*") if path.is_dir() else [path]
        print(f"{path}: {sum(f.stat().st_size for f in files if f.is_file()) / 1e6:,.1f} MB")
    if done.left_out:
        print(f"left out, as no part of the transformer: {', '.join(done.left_out)}")
