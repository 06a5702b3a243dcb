"""`sat-ext cache`: latents and text embeddings of a run's whole data set, on disk."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import track

from sat_ext.cli.base import BaseOption, MoreYaml
from sat_ext.data.index import Index, build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.visits import Visit
from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.latents.encoders import Encoders, Fingerprints, Part
from sat_ext.latents.reader import Entries, captions_of, media_codes
from sat_ext.latents.store import CacheConfig, Entry, LatentStore
from sat_ext.latents.text import write_text_embeddings
from sat_ext.latents.writer import Progress, Work, missing_work, require_room, write_samples
from sat_ext.recipe import Recipe, read_recipe
from sat_ext.sat import peers
from sat_ext.sat.broadcast import share_from_first_rank


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

    Under torchrun or the DeepSpeed launcher (`--module sat_ext.cli.main cache ...`) each rank does a part. What is
    there already is left as it is, so the command goes on where it was killed.
    """
    run = read_recipe([*base, *(more or [])]).checked()
    rank, world = _join()
    settings = _settings(run, output, clips)
    folder = Path(settings.folder)
    prints, make = _encoders(run)
    console = Console(stderr=True, quiet=rank > 0)
    folder.mkdir(parents=True, exist_ok=True)
    given = [sources for sources in (run.sources, run.held_out) if sources]
    lists = share_from_first_rank(lambda: [_index(run.data, sources, console) for sources in given])
    work = share_from_first_rank(lambda: _work(run.data, lists, settings, prints))
    if work.samples or work.captions:
        _use_own_gpu()
        encoders = make()
        share_from_first_rank(lambda: _announce(work, encoders, settings, folder, console))
        _write(work.of_rank(rank, world), encoders, run, settings, prints, console)
    dist.barrier()
    facts = share_from_first_rank(lambda: _facts(run.data, lists, settings, prints, work))
    if rank == 0:
        if as_json:
            print(json.dumps(facts))
        else:
            _show(facts, run)
    dist.destroy_process_group()


def _join() -> tuple[int, int]:
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


def _use_own_gpu() -> None:
    """Have "the GPU" of libraries that name no number be this rank's: CogVideo's T5 sends its tokens there, and
    bitsandbytes quantizes there. Raises `ConfigError` where the machine has too few."""
    local = int(os.environ["LOCAL_RANK"])
    if not torch.cuda.is_available():
        return
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK: {local}, but this machine has {torch.cuda.device_count()} GPUs; start one process "
            "per GPU."
        )
    torch.cuda.set_device(local)


def _settings(run: Recipe, output: Path | None, clips: int | None) -> CacheConfig:
    given = run.data.cache
    if given is None and output is None:
        raise ConfigError("-o: name a folder for the cache, or set data.params.cache.folder.")
    settings = given or CacheConfig(folder=str(output))
    if output is not None:
        settings = replace(settings, folder=str(output))
    return settings if clips is None else replace(settings, clips=clips)


def _encoders(run: Recipe) -> tuple[Fingerprints, Any]:
    """Fingerprints, and what builds the encoders where this rank computes."""
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    )
    engine = run.engine
    return engine.fingerprints(run.dtype), lambda: engine.encoders(run.dtype, device)


def _index(data: DataConfig, sources: Any, console: Console) -> Index:
    return build_index(
        sources, data,
        probing=lambda found, total: track(found, description="probing files", total=total, console=console),
    )  # fmt: skip


def _wanted(
    data: DataConfig, lists: list[Index], settings: CacheConfig, prints: Fingerprints
) -> Iterator[tuple[Visit, Entry]]:
    for index in lists:
        yield from Entries(
            index=index, config=data, encoder=prints.first_stage, clips=settings.clips, media=media_codes(index)
        )


def _work(data: DataConfig, lists: list[Index], settings: CacheConfig, prints: Fingerprints) -> Work:
    captions = [c for index in lists for c in captions_of(index)]
    wanted = {entry.key: (visit, entry) for visit, entry in _wanted(data, lists, settings, prints)}
    return missing_work(Path(settings.folder), wanted.values(), captions)


def _announce(work: Work, encoders: Encoders, settings: CacheConfig, folder: Path, console: Console) -> None:
    needed = work.bytes_on_disk(encoders.shape, settings.conditions)
    console.print(
        f"{folder}: {len(work.samples)} samples and {len(work.captions)} captions to encode, about "
        f"{needed / 1e9:.2f} GB"
    )
    require_room(folder, needed)


def _write(
    work: Work, encoders: Encoders, run: Recipe, settings: CacheConfig, prints: Fingerprints, console: Console
) -> None:
    folder = Path(settings.folder)
    errors: list[MediaError] = []
    # one encoder after the other, each only where there is work for it
    if work.captions:
        with _held(encoders, "text", run):
            write_text_embeddings(
                folder, work.captions, encoders.embed, prints.text, progress=_progress("captions", console)
            )
    if work.samples:
        with _held(encoders, "first_stage", run):
            errors = write_samples(
                folder, work.samples, encoders, conditions=settings.conditions, decoder=run.data.decoder,
                timeout=run.data.on_bad_sample.timeout, workers=run.num_workers,
                progress=_progress("encoding", console),
            )  # fmt: skip
    for error in errors:
        print(f"left out, fix or remove it: {error}", file=sys.stderr)


def _progress(description: str, console: Console) -> Progress:
    return lambda items, total: track(items, description=description, total=total, console=console)


@contextmanager
def _held(encoders: Encoders, part: Part, run: Recipe) -> Iterator[None]:
    """Inside, `part` is loaded. Raises `ConfigError` where the GPU is too small for it."""
    try:
        with encoders.holding(part):
            yield
    except torch.cuda.OutOfMemoryError as error:
        remedy = run.engine.too_large(part)
        name = {"text": "text encoder", "first_stage": "first stage"}[part]
        raise ConfigError(
            f"the GPU's memory is too small for the {name} ({str(error).split('.')[0]}); "
            f"{remedy}. What is already encoded is kept; `sat-ext plan` predicts what each part takes."
        ) from error


def _facts(
    data: DataConfig, lists: list[Index], settings: CacheConfig, prints: Fingerprints, work: Work
) -> dict[str, Any]:
    """Of the whole cache, which must now hold all; `DataError` where another rank could not write its part."""
    folder = Path(settings.folder)
    entries = {entry.key: entry for _, entry in _wanted(data, lists, settings, prints)}
    store = LatentStore(folder)
    store.require(list(entries.values()), "the command again")
    bad = [e.name for e in entries.values() if store.is_bad(e.key)]
    limit = data.on_bad_sample.skip
    if len(bad) > limit:
        raise DataError(
            f"{folder}: {len(bad)} samples cannot be read, more than data.params.on_bad_sample.skip ({limit}) "
            f"allows: {', '.join(bad[:3])} ...; fix or remove them, or raise the limit."
        )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "folder": str(folder), "samples": len(entries), "encoded": len(work.samples), "bad": bad,
        "captions_encoded": len(work.captions), "bytes": size, "clips": settings.clips,
    }  # fmt: skip


def _show(facts: dict[str, Any], run: Recipe) -> None:
    folder = facts["folder"]
    size, bad = facts["bytes"] / 1e9, len(facts["bad"])
    print(
        f"{folder}: {facts['samples']} samples, of which {facts['encoded']} were encoded now, and "
        f"{facts['captions_encoded']} captions; {size:.2f} GB; {bad} files unreadable"
    )
    print(f"To train from it, {run.engine.train_from(folder, facts['clips'])}")
