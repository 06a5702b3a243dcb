"""`sat-ext cache`: latents and text embeddings of a run's whole data set, on disk."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress, track
from torch.distributed.distributed_c10d import _get_default_store

from sat_ext.cli.base import BaseOption, MoreYaml
from sat_ext.data.index import Index, build_index
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import ConfigError
from sat_ext.latents.encoders import Encoders
from sat_ext.latents.store import CacheConfig
from sat_ext.latents.writer import CacheJob, Missing, encode_missing, require_room
from sat_ext.recipe import Recipe, read_recipe
from sat_ext.sat import peers
from sat_ext.sat.broadcast import share_from_first_rank
from sat_ext.sat.probing import probe_on_all_ranks


def cache(
    base: BaseOption,
    more: MoreYaml = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="the cache's folder; else data.params.cache.folder")
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="draws of each clip; else data.params.cache.clips")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Encode the data set of a run, what it is evaluated on too, with its own first stage and text encoder.

    Under torchrun or the DeepSpeed launcher (`--module sat_ext.cli.main cache ...`) ranks share the work. What
    the folder already holds is kept, so a killed command can be run again.
    """
    run = read_recipe([*base, *(more or [])]).checked()
    rank, world = join()
    settings, prints = _settings(run, output, clips), run.engine.fingerprints(run.dtype)
    console = Console(stderr=True, quiet=rank > 0)

    def progress(name: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        with Progress(console=console) as bar:
            task = bar.add_task(name, total=total)
            for item in items:
                yield item
                bar.update(task, completed=item[0] + 1)

    def build(sources: Sequence[SourceConfig]) -> Index:
        probing = partial(track, description="probing files", console=console)
        return build_index(
            sources,
            run.data,
            probing=lambda outcomes, total: probing(outcomes, total=total),
            probe=probe_on_all_ranks,
        )

    store = _get_default_store()

    def take(name: str) -> int:  # added up in the store, so that no two ranks get the same number
        return int(store.add(f"sat_ext/cache/{name}", 1)) - 1

    Path(settings.folder).mkdir(parents=True, exist_ok=True)
    given = [sources for sources in (run.sources, run.held_out) if sources]
    indices = share_from_first_rank(lambda: [build(sources) for sources in given])
    job = CacheJob(indices=indices, data=run.data, settings=settings, prints=prints)
    missing = share_from_first_rank(job.missing)
    if len(missing.samples) or len(missing.captions):
        encoders = run.engine.encoders(run.dtype, own_device())
        share_from_first_rank(lambda: _announce(job, missing, encoders, console))
        errors = encode_missing(
            job, missing, encoders, run.engine, world=world, take=take, workers=run.num_workers, progress=progress
        )
        for error in errors:
            print(f"left out, fix or remove it: {error}", file=sys.stderr)
    dist.barrier()
    facts = share_from_first_rank(lambda: job.facts(missing))
    if rank == 0:
        if as_json:
            print(json.dumps(facts))
        else:
            _show(facts, run)
    dist.destroy_process_group()


def join() -> tuple[int, int]:
    """This process among those of a launcher, or alone."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost")):
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo")
        peers.set_limit(timedelta(days=7))  # ranks finish hours apart, and one that ends still ends the others
        peers.begin()
    return dist.get_rank(), dist.get_world_size()


def own_device() -> torch.device:
    """This rank's GPU, made the current one: CogVideo's T5 sends its tokens to "cuda", and bitsandbytes quantizes
    there. Raises `ConfigError` where the machine has too few."""
    local = int(os.environ["LOCAL_RANK"])
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK: {local}, but this machine has {torch.cuda.device_count()} GPUs; start one process "
            "per GPU."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _settings(run: Recipe, output: Path | None, clips: int | None) -> CacheConfig:
    given = run.data.cache or CacheConfig(folder="")
    folder = str(output) if output else given.folder
    if not folder:
        raise ConfigError("-o: name a folder for the cache, or set data.params.cache.folder.")
    return replace(given, folder=folder, clips=clips or given.clips)


def _announce(job: CacheJob, missing: Missing, encoders: Encoders, console: Console) -> None:
    conditions = job.settings.conditions if encoders.conditions else 0
    needed = missing.bytes_on_disk(encoders.dtype.itemsize, conditions)
    console.print(
        f"{job.folder}: {len(missing.samples)} samples and {len(missing.captions)} captions to encode, about "
        f"{needed / 1e9:.2f} GB"
    )
    require_room(job.folder, needed)


def _show(facts: dict[str, Any], run: Recipe) -> None:
    print(
        f"{facts['folder']}: {facts['samples']} samples, {facts['bytes'] / 1e9:.2f} GB; encoded now: "
        f"{facts['encoded']} samples, {facts['captions_encoded']} captions; {len(facts['bad'])} files unreadable"
    )
    print(f"To train from it, {run.engine.train_from(facts['folder'], facts['clips'])}")
