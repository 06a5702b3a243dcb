"""`sat-ext`: one file per subcommand."""

import logging
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from sat_ext.errors import SatExtError

COMMANDS = (
    *("bench", "cache", "check", "convert", "demo", "export", "init", "plan", "preview", "prior", "report"),
    *("sample", "scenes", "score"),
)


class Commands(TyperGroup):
    """Subcommands, imported on use: SAT and diffusers take seconds to import, and most commands need neither."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Their names."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """The one of this name, or None."""
        if cmd_name not in COMMANDS:
            return None
        alone = typer.Typer(pretty_exceptions_enable=False)
        alone.command()(getattr(import_module(f"sat_ext.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(alone)


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Train video diffusion models on images and videos together."""


def main() -> None:
    """Run a subcommand; a user's mistake ends in one sentence and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # PEFT imports it, and on a CPU it warns of a kernel that only a quantized model would call
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except SatExtError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        from sat_ext.sat.peers import sentence_of_lost  # imports SAT

        if not (sentence := sentence_of_lost(error)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
