"""`sat-ext preview`: one page that shows what the model will see of the data."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sat_ext.cli.base import BaseOption, MoreYaml, probing
from sat_ext.data.index import build_index
from sat_ext.data.stream import JointStream
from sat_ext.errors import ConfigError
from sat_ext.files.atomic import written_aside
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
    size = write_page(output, render(report))
    print(f"{output}: {len(report.findings)} findings, {len(report.buckets)} buckets, {size}")


def require_file(output: Path) -> None:
    """Raise `ConfigError` unless a page can be written there."""
    if output.exists() and not output.is_file():  # a device or a folder, which the page would replace
        raise ConfigError(f"-o: {output} is not a file; name one, such as report.html.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"-o: there is no folder {output.absolute().parent}; make it, or name another.")


def write_page(output: Path, page: str) -> str:
    """Write a page, and return how large it is. Raises `ConfigError`."""
    require_file(output)
    try:
        with written_aside(output) as draft:
            draft.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"-o: {output} cannot be written ({error.strerror}); name another file.") from error
    return f"{len(page) / 1e3:,.0f} kB"
