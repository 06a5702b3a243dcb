"""`sat-ext`: one file per subcommand."""

from __future__ import annotations

import logging
import sys

import typer

from sat_ext.cli.bench import bench
from sat_ext.cli.cache import cache
from sat_ext.cli.check import check
from sat_ext.cli.convert import convert
from sat_ext.cli.demo import demo
from sat_ext.cli.export import export
from sat_ext.cli.plan import plan
from sat_ext.cli.preview import preview
from sat_ext.cli.sample import sample
from sat_ext.errors import SatExtError

app = typer.Typer(
    help="Train video diffusion models on images and videos together.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(cache)
app.command()(check)
app.command()(convert)
app.command()(demo)
app.command()(export)
app.command()(plan)
app.command()(preview)
app.command()(sample)


def main() -> None:
    """Run a subcommand; a user's mistake ends in one sentence and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except SatExtError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        from sat_ext.sat.peers import sentence_of_lost  # SAT, which most commands do without

        if not (sentence := sentence_of_lost(error)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
