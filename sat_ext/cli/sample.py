"""`sat-ext sample`: generate from a run's newest checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

from sat_ext.contact_sheet import SheetRow, write_clip, write_sheet
from sat_ext.data.decode import read_still
from sat_ext.data.index import build_index
from sat_ext.data.stream import JointStream
from sat_ext.data.transform import Fit
from sat_ext.errors import ConfigError
from sat_ext.pixels import to_model_range, to_uint8
from sat_ext.recipe import Recipe, recipe_of
from sat_ext.types import Bucket

if TYPE_CHECKING:
    from sat_ext.models.engine import VideoDiffusionEngine


def sample(
    run: Annotated[Path, typer.Argument(help="the run's folder, or the folder of several (the newest is taken)")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="what to show; may be given again. Default: held-out captions")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="first frame, for image-to-video models")] = None,
    frames: Annotated[int | None, typer.Option(help="1 or 4k+1; default: the longest bucket")] = None,
    number: Annotated[int, typer.Option(min=1, help="held-out captions of each kind")] = 6,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps; default: the model's YAML")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="strength of the caption, 1 is none; default: the model's YAML")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    ema: Annotated[bool, typer.Option("--ema", help="use the averaged weights")] = False,
    sheet: Annotated[Path, typer.Option(help="contact sheet (PNG)")] = Path("samples.png"),
    clip: Annotated[Path, typer.Option(help="clips side by side (MP4)")] = Path("samples.mp4"),
) -> None:
    """Generate stills and clips from captions, and show them beside what was asked for."""
    # imported here: diffusers and transformers take seconds, which --help and a wrong call need not wait for
    from sat_ext.checkpoint.layout import find_run, read_run_config
    from sat_ext.models.generate import load_engine, sample_rows

    folder = find_run(run)
    recipe = recipe_of(read_run_config(folder))
    engine, iteration = load_engine(folder, ema=ema)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance, "generator": generator}
    if prompt:
        bucket = _bucket(recipe, frames)
        rows = [_from_prompt(engine, p, bucket, image, options) for p in prompt]
    else:
        rows = [row for batch in held_out_batches(recipe, number) for row in sample_rows(engine, batch, **options)]
    write_sheet(rows, sheet)
    print(f"checkpoint of step {iteration} in {folder}: {len(rows)} samples in {sheet}")
    if any(len(s) > 1 for row in rows for s in row.strips.values()):
        write_clip(rows, clip, recipe.data.fps)
        print(f"clips in {clip}")


def _bucket(recipe: Recipe, frames: int | None) -> Bucket:
    buckets = {b.frames: b for b in reversed(recipe.buckets)}  # the first of each length
    length = max(buckets) if frames is None else frames
    if length not in buckets:
        raise ConfigError(
            f"--frames: the model was not trained on {length} frames; use one of "
            f"{', '.join(map(str, sorted(buckets)))}."
        )
    return buckets[length]


def _from_prompt(
    engine: "VideoDiffusionEngine", prompt: str, bucket: Bucket, image: Path | None, options: dict[str, Any]
) -> SheetRow:
    from sat_ext.models.generate import generate

    first, strips = None, {}
    if image is not None:
        pixels = torch.from_numpy(read_still(str(image), fit=Fit(bucket.height, bucket.width)))
        first = to_model_range(pixels, torch.float32)
        strips["first frame"] = to_uint8(pixels)
    out = generate(
        engine, [prompt], frames=bucket.frames, height=bucket.height, width=bucket.width, first_frames=first,
        **options,
    )  # fmt: skip
    return SheetRow(caption=prompt, strips={**strips, "generated": to_uint8(out[0])})


def held_out_batches(recipe: Recipe, number: int) -> list[dict[str, Any]]:
    """Captions and pixels of `args.valid_data`: up to `number` of each kind, all of a kind from one bucket."""
    sources, data = recipe.lists["valid_data"], recipe.data
    if not sources:
        raise ConfigError("--prompt: missing, and the run has no args.valid_data to take captions from.")
    size = replace(recipe.step_size, batches=dict.fromkeys(recipe.buckets, number), budget=None)
    stream = JointStream(build_index(sources, data), data, size=size, world=1, dtype=torch.float32)
    firsts = {cell.bucket.kind: i for i, cell in reversed(list(enumerate(stream.schedule.cells)))}
    records = [cell.records for cell in stream.schedule.cells]
    return [stream.collated(i, np.arange(min(number, records[i]))) for i in sorted(firsts.values())]
