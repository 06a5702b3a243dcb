"""The option that names a run, of every subcommand that reads one."""

from typing import Annotated

import typer

# `--base a.yaml b.yaml c.yaml`: an option takes one value, so the others arrive as arguments.
BaseOption = Annotated[
    list[str], typer.Option("--base", metavar="YAML...", help="YAML files of the run, merged from left to right")
]
MoreYaml = Annotated[list[str] | None, typer.Argument(hidden=True)]
