"""`sat-ext export`: what a run trained, for diffusers."""

from pathlib import Path
from typing import Annotated

import typer

from sat_ext.cli.base import MoreYaml
from sat_ext.cli.convert import AlphaOption, EmaOption, OutputOption, SizeOption, YamlOption, make_options, report


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="a run's folder, one of its checkpoints, or a file of weights")
    ],
    output: OutputOption,
    base: YamlOption = None,
    size: SizeOption = None,
    alpha: AlphaOption = None,
    ema: EmaOption = False,
    more: MoreYaml = None,
) -> None:
    """Write a run's LoRA as diffusers' `load_lora_weights` takes it, or a fully trained transformer's folder."""
    # here, because diffusers takes seconds to import, which would slow down the other subcommands
    from sat_ext.convert import convert as conversions

    options = make_options(checkpoint, base, more, size, alpha=alpha, ema=ema)
    done = conversions.export(checkpoint, output, options)
    report(done)
    if done.lora is not None:
        print(f"pipeline.load_lora_weights({str(output)!r})  # rank {done.lora.rank}, alpha {done.lora.alpha}")
