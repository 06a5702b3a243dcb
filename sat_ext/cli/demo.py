"""`sat-ext demo`: a small real data set to try things on."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from sat_ext.demo_data import write_demo


def demo(
    folder: Annotated[Path, typer.Argument(help="where to write; must be empty or absent")],
    clips: Annotated[int, typer.Option(min=1, help="clips to train on")] = 48,
    stills: Annotated[int, typer.Option(min=1, help="stills to train on")] = 48,
    held_out: Annotated[int, typer.Option(min=1, help="clips, and as many stills, to evaluate on")] = 16,
    seed: Annotated[int, typer.Option(help="another seed gives other shapes, places and captions")] = 0,
) -> None:
    """Write a mixed data set: H.264 clips, JPEG, PNG and WebP stills, one-frame MP4s, and a caption for each."""
    bar = partial(track, description="writing")
    write_demo(folder, clips=clips, stills=stills, held_out=held_out, seed=seed, progress=bar)
    print(f"{folder}: {clips} clips and {stills} stills in train/, {held_out} of each in heldout/")
