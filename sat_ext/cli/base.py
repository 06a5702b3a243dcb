"""What several subcommands share: the option that names a run, and the bar while its files are probed."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from sat_ext.data.index.probing import Probing

# `--base a.yaml b.yaml c.yaml`: an option takes one value, so the others arrive as arguments.
BaseOption = Annotated[
    list[str], typer.Option("--base", metavar="YAML...", help="YAML files of the run, merged from left to right")
]
MoreYaml = Annotated[list[str] | None, typer.Argument(hidden=True)]


def probing(console: Console) -> Probing:
    """A progress bar for `build_index`."""
    return lambda found, total: track(found, description="probing files", total=total, console=console)
