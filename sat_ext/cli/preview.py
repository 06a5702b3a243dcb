"""`sat-ext preview`: one page that shows what the model will see of the data."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sat_ext.cli.base import BaseOption, MoreYaml, probing, require_file, write_file
from sat_ext.data.index import build_index
from sat_ext.data.stream import JointStream
from sat_ext.preview.gather import gather
from sat_ext.preview.report import render
from sat_ext.recipe import read_recipe


def preview(
    base: BaseOption,
    more: MoreYaml = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="the page (HTML)")] = Path("report.html"),
    gpus: Annotated[int, typer.Option(min=1, help="data-parallel ranks of the run")] = 1,
) -> None:
    """Write a page that shows what the model will see: samples of each bucket, shares, sizes, and what to fix."""
    yaml = [*base, *(more or [])]
    run = read_recipe(yaml).checked()
    console = Console(stderr=True)
    require_file(output)
    # The page has to show the very files that would stop a training run.
    data = replace(run.data, on_bad_sample=replace(run.data.on_bad_sample, skip=sys.maxsize))
    index = build_index(run.sources, data, probing=probing(console))
    stream = JointStream(index, run.data, size=run.step_size, world=gpus, dtype=run.dtype)
    with console.status("reading samples"):
        report = gather(yaml, stream, run)
    size = write_file(output, render(report))
    print(f"{output}: {len(report.findings)} findings, {len(report.buckets)} buckets, {size}")
