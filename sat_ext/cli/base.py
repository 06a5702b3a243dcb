"""What several subcommands share: the option that names a run, the bar of its files, and what `-o` names."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from sat_ext.data.index.probing import Probing
from sat_ext.errors import ConfigError
from sat_ext.files.atomic import written_aside

# `--base a.yaml b.yaml c.yaml`: an option takes one value, so the others arrive as arguments.
BaseOption = Annotated[
    list[str], typer.Option("--base", metavar="YAML...", help="YAML files of the run, merged from left to right")
]
MoreYaml = Annotated[list[str] | None, typer.Argument(hidden=True)]


def probing(console: Console) -> Probing:
    """A progress bar for `build_index`."""
    return lambda found, total: track(found, description="probing files", total=total, console=console)


def require_file(output: Path, *, new: bool = False) -> None:
    """Raise `ConfigError` unless a file, or a `new` one, can be written there."""
    if new and output.exists():
        raise ConfigError(f"-o: {output} exists; remove it, or name another.")
    if output.exists() and not output.is_file():  # a device or a folder, which it would replace
        raise ConfigError(f"-o: {output} is not a file; name one, such as report.html.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"-o: there is no folder {output.absolute().parent}; make it, or name another.")


def write_file(output: Path, text: str) -> str:
    """Write `output`, and return how large it is. Raises `ConfigError`."""
    require_file(output)
    try:
        with written_aside(output) as draft:
            draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"-o: {output} cannot be written ({error.strerror}); name another file.") from error
    return f"{len(text) / 1e3:,.0f} kB"
