"""`sat-ext report`: one page about a run, also while it goes on."""

from pathlib import Path
from typing import Annotated

import typer

from sat_ext.cli.base import write_file
from sat_ext.report.page import render
from sat_ext.report.read import read_run


def report(
    run: Annotated[Path, typer.Argument(help="the run's folder, or the folder of several (the newest is taken)")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the page (HTML)")] = Path("run.html"),
    events: Annotated[
        Path | None,
        typer.Option(help="the folder of TensorBoard's files, where it is not where the run has put it"),
    ] = None,
) -> None:
    """Write a page with the losses by kind, gradients, samples, time, memory and skipped files of a run."""
    found = read_run(run, events)
    size = write_file(output, render(found))
    print(f"{output}: {found.folder.name}, step {found.iteration:,}, {size}")
