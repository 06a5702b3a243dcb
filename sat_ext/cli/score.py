"""`sat-ext score`: how many samples of a run on the demo's data show what their captions ask for."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sat_ext.cli.sample import held_out_batches
from sat_ext.demo_score import described, right_in
from sat_ext.errors import ConfigError
from sat_ext.files.atomic import written_aside
from sat_ext.recipe import recipe_of


def score(
    run: Annotated[Path, typer.Argument(help="the run's folder, or the folder of several (the newest is taken)")],
    number: Annotated[int, typer.Option(min=1, help="held-out captions of each kind")] = 48,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Generate what held-out captions of `sat-ext demo`'s data ask for, and count how often the pixels show it."""
    # imported here: diffusers and transformers take seconds, which --help and a wrong call need not wait for
    from sat_ext.checkpoint.layout import find_run, read_run_config
    from sat_ext.models.generate import load_engine, sample_rows

    folder = find_run(run).resolve()
    file = folder.parent / "result.json"
    result = _result(file)
    if Path(result.get("run", folder)).name != folder.name:
        result = {}  # of another run
    batches = held_out_batches(recipe_of(read_run_config(folder)), number)
    for caption in [caption for batch in batches for caption in batch["txt"]]:
        described(caption)  # raises for other data, before minutes of sampling
    engine, _ = load_engine(folder)
    right, generator = {}, torch.Generator().manual_seed(seed)
    for batch in batches:
        kind, rows = batch["kind"][0], sample_rows(engine, batch, generator=generator)
        right[kind] = right_in([(row.caption, row.strips["generated"]) for row in rows])
        print(f"{kind}s that show what was asked for: " + ", ".join(f"{k} {n}" for k, n in right[kind].items()))
    with written_aside(file) as aside:
        aside.write_text(json.dumps({"run": str(folder), **result, "samples": right}, indent=2) + "\n")


def _result(file: Path) -> dict[str, Any]:
    """What the run has written of its losses, if it has. Raises `ConfigError`."""
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: not the result of a run ({error}); remove it.") from error
