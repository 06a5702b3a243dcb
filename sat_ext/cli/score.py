"""`sat-ext score`: how many samples of a run on the demo's data show what their captions ask for."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from sat_ext.cli.sample import held_out_rows
from sat_ext.demo_score import right_in
from sat_ext.files.atomic import written_aside
from sat_ext.recipe import recipe_of


def score(
    run: Annotated[Path, typer.Argument(help="the run's folder, or the folder of several (the newest is taken)")],
    number: Annotated[int, typer.Option(min=1, help="held-out captions of each kind")] = 48,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Generate what held-out captions of the demo ask for, and measure in the pixels how often it is there."""
    # imported here: diffusers and transformers take seconds, which --help and a wrong call need not wait for
    from sat_ext.checkpoint.layout import find_run, read_run_config
    from sat_ext.models.generate import load_engine

    folder = find_run(run)
    recipe = recipe_of(read_run_config(folder))
    engine, _ = load_engine(folder)
    rows = held_out_rows(engine, recipe, number, {"generator": torch.Generator().manual_seed(seed)})
    right = {}
    for kind in ("image", "video"):
        of_kind = [row for row in rows if (len(row.strips["generated"]) > 1) == (kind == "video")]
        right[kind] = right_in([(row.caption, row.strips["generated"]) for row in of_kind])
        print(f"{kind}s that show what was asked for: " + ", ".join(f"{k} {n}" for k, n in right[kind].items()))
    file = folder.parent / "result.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    with written_aside(file) as aside:
        aside.write_text(json.dumps({**result, "samples": right}, indent=2) + "\n")
