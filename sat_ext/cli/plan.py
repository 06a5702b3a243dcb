"""`sat-ext plan`: what a run takes of a GPU's and a host's memory, and the ZeRO configuration to use."""

import json
import re
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from sat_ext.cli.base import BaseOption, MoreYaml
from sat_ext.errors import ConfigError
from sat_ext.memory.advice import Room, advise, cache_that_fits
from sat_ext.memory.measured import measurements
from sat_ext.memory.run import run_from
from sat_ext.memory.table import as_data, configurations, of_buckets, of_cache, of_one, sentences
from sat_ext.recipe import read_recipe

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
WIDTH = 150  # columns, where the output is not a terminal


def plan(
    base: BaseOption,
    more: MoreYaml = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run, of all machines")] = 1,
    per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="GPUs in each machine [default: all]")
    ] = None,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="of each GPU; GB is 1e9 bytes")] = "24GB",
    host_memory: Annotated[str, typer.Option(metavar="SIZE", help="of each machine")] = "64GB",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Predict memory by part, as given and for each ZeRO configuration, and say which to use; 1 if none fits."""
    run = run_from(read_recipe([*base, *(more or [])]))
    room = Room(
        gpus=gpus,
        per_node=min(per_node or gpus, gpus),
        gpu_memory=size_of(gpu_memory, "--gpu-memory"),
        host_memory=size_of(host_memory, "--host-memory"),
    )
    progress = Console(stderr=True)
    steps = track(measurements(run), "measuring the modules", console=progress, transient=True)
    for measure in steps:
        measure()
    with progress.status("comparing configurations"):
        advice, cache = advise(run, room), cache_that_fits(run, room.per_node, room.gpu_memory)
    if as_json:
        print(json.dumps(as_data(advice, cache, room)))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        given = advice.plans[0]
        for table in (configurations(advice, room), of_one(given), of_buckets(given), of_cache(cache, room)):
            console.print(table)
            console.print()
        for line in sentences(advice, room):
            console.print(line, highlight=False)
    if advice.recommended is None:
        raise typer.Exit(1)


def size_of(text: str, where: str) -> int:
    """Bytes of a size such as 24GB, 24 GiB or 25769803776. Raises `ConfigError`.

    >>> size_of("24GB", "--gpu-memory"), size_of("1.5 GiB", "--gpu-memory")
    (24000000000, 1610612736)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{where}: {text!r} is not a size; write 24GB or 24GiB.")
    unit = (found[2] or "").capitalize()
    return int(float(found[1]) * UNITS[unit])
