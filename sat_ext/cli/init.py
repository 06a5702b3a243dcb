"""`sat-ext init`: the YAML of a run, from a folder of clips and stills."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sat_ext.cli.base import probing, require_file, write_file
from sat_ext.cli.plan import size_of
from sat_ext.errors import ConfigError
from sat_ext.memory.advice import Room
from sat_ext.starter.models import ROOT, model_of
from sat_ext.starter.render import render
from sat_ext.starter.run import Choice, choose
from sat_ext.starter.survey import survey


def init(
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="folders, tables or shards, with captions")],
    model: Annotated[str, typer.Option(help="one of configs/model/, such as cogvideox-5b-i2v")],
    weights: Annotated[Path | None, typer.Option(metavar="FOLDER", help="the model, in diffusers' layout")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of this machine")] = 1,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="of each GPU; GB is 1e9 bytes")] = "24GB",
    host_memory: Annotated[str, typer.Option(metavar="SIZE", help="of the machine")] = "64GB",
    cogvideo: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="the folder sat/ of a CogVideo checkout, to train there")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="the YAML")] = Path("my_run.yaml"),
) -> None:
    """Look at the data, choose what a run needs, and write it down, with a reason for each choice.

    With --cogvideo the YAML is for CogVideo's own script, after its two files, and --weights are its own, in SAT's
    layout."""
    known = model_of(model)
    output = output if output.suffix in (".yaml", ".yml") else output.with_name(f"{output.name}.yaml")
    require_file(output, new=True)
    is_tiny = known.cogvideo is None
    if weights is None and cogvideo is None and not is_tiny:
        raise ConfigError("--weights: missing; name the model's folder in diffusers' layout, or --cogvideo.")
    if weights is not None and is_tiny:
        raise ConfigError(f"--weights: {model} has none; leave it out.")
    if weights is not None and not weights.is_dir():
        raise ConfigError(f"--weights: there is no folder {weights}.")
    room = Room(
        gpus=gpus, per_node=gpus, gpu_memory=size_of(gpu_memory, "--gpu-memory"),
        host_memory=size_of(host_memory, "--host-memory"),
    )  # fmt: skip
    console = Console(stderr=True)
    found = survey(data, known.fps, known.native, probing=probing(console))
    with console.status("choosing"):
        choice = choose(
            model, known, data, found, output.absolute(), room, weights=weights and weights.absolute(),
            checkout=cogvideo and cogvideo.absolute(),
        )  # fmt: skip
    heading = (
        f"Written by sat-ext init for {model} on {gpus} GPU{'' if gpus == 1 else 's'} of {gpu_memory}.\n"
        f"Found: {'; '.join(found.sentences())}."
    )
    if choice.before:
        heading += f"\nAppend it to {' '.join(choice.before)}."
    write_file(output, render(choice.config, choice.comments, heading))
    if choice.cached:
        write_file(
            _after(output), render(choice.cached, {}, f"Append it to {output.name} once the cache is made.")
        )
    for line in (*found.sentences(), *choice.reasons):
        print(line)
    print(f"\nWritten to {output}. Next:")
    for command in _commands(choice, output, gpus, cogvideo):
        print(f"  {command}")


def _after(output: Path) -> Path:
    """The YAML that trains from a cache under CogVideo's script, whose encoders have to be there to make it."""
    return output.with_name(f"{output.stem}-cached.yaml")


def _commands(choice: Choice, output: Path, gpus: int, checkout: Path | None) -> list[str]:
    own, theirs = output, choice.before
    if checkout is not None:
        own, theirs = output.absolute(), [os.path.relpath(file, checkout) for file in choice.before]
    base = " ".join(map(shlex.quote, [*theirs, str(own)]))
    trains = f"{base} {shlex.quote(str(_after(own)))}" if choice.cached else base
    start = f"torchrun --standalone --nproc_per_node {gpus}" if gpus > 1 else "python"
    script = shlex.quote(os.path.relpath(ROOT / "train_video.py"))
    into = ""
    if checkout is not None:
        into, script = f"cd {shlex.quote(str(checkout.absolute()))} && ", "train_video.py"
        if gpus == 1:
            start = "WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 python"
    commands = [f"{into}sat-ext cache --base {base} -o {shlex.quote(choice.cache)}"] if choice.cache else []
    page = shlex.quote(str(own.with_suffix(".html")))
    return [*commands, f"{into}sat-ext preview --base {base} -o {page}", f"{into}{start} {script} --base {trains}"]
