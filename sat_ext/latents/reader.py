"""Samples from a cache: the entries of an index's records, and their latents in place of media."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.visits import Visit, draw_caption, visit_of
from sat_ext.latents.encoders import Fingerprints
from sat_ext.latents.store import Entry, LatentStore, fingerprint_of
from sat_ext.latents.text import TextEmbeddings
from sat_ext.types import Sample

COMMAND = "'sat-ext cache --base ...' with the YAML files of this run"


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The entries of an index's records, `clips` of each that a random sampler draws from.

    `encoder` is the first stage's fingerprint.
    """

    index: Index
    config: DataConfig
    encoder: str
    clips: int

    def find(self, group: Group, record: int, number: int) -> tuple[Visit, Entry]:
        """Visit `number` of a record, and the entry of its latents."""
        row = int(group.rows[record])
        window = group.window(record)
        item, _ = self.index.item(row)
        name = f"{group.source}/{item.key}"
        # seeded by the record's name and the draw alone: what is cached stays valid beside other files and shares
        seeds = [self.config.seed, int(fingerprint_of(name)[:16], 16), window, number % self.clips]
        visit = visit_of(self.index, self.config, group, record, np.random.default_rng(seeds))
        times = None if visit.times is None else [round(t, 6) for t in visit.times]
        media = fingerprint_of(self.index.table["fingerprint"][row].as_py())[:16]
        return visit, Entry(
            name=name, media=media, clip=fingerprint_of(times, item.crop), size=str(group.bucket),
            encoder=self.encoder,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Visit, Entry]]:
        """All that training on the index can ask for, each once."""
        found: set[str] = set()
        for group in self.index.groups:
            for record in range(len(group.rows)):
                for draw in range(self.clips):
                    visit, entry = self.find(group, record, draw)
                    if entry.key not in found:
                        found.add(entry.key)
                        yield visit, entry


@dataclass(frozen=True, kw_only=True)
class LatentReader:
    """The records of an index as samples of latents.

    With `draws` latents are drawn from the posterior and conditions are noisy; without (evaluations) they are the
    posterior's mode and the clean frame's. `conditions`: the model is image-to-video; a still's condition is zero.
    """

    entries: Entries
    store: LatentStore
    draws: bool
    conditions: bool

    def read(self, group: Group, record: int, number: int, rng: np.random.Generator) -> Sample:
        """Visit `number` of a record, with the caption that `MediaReader` draws. Raises `MediaError`."""
        visit, entry = self.entries.find(group, record, number)
        caption = draw_caption(visit.item, rng)
        parts = self.store.read(entry.key)
        latents = parts["mean"]
        if self.draws and "std" in parts:
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            noise = torch.randn(latents.shape, generator=generator)
            latents = (latents.float() + parts["std"].float() * noise).to(latents.dtype)
        if not self.conditions:
            return visit.sample(latents, caption)
        if "first" not in parts:
            condition = torch.zeros_like(latents[:1])
        elif self.draws:
            condition = parts["noisy"][number // self.entries.clips % len(parts["noisy"])]
        else:
            condition = parts["first"]
        return visit.sample(latents, caption, condition)


def open_reader(
    config: DataConfig,
    index: Index,
    prints: Fingerprints,
    *,
    draws: bool,
    conditions: bool,
    share: Callable[[Callable[[], None]], None],
) -> LatentReader:
    """The reader of the cache that `data.params.cache` names, which holds all that a run on `index` asks for.

    `share` calls its argument on the first rank and raises its error on every rank. Raises `DataError` where the
    cache lacks something, and `ConfigError` where its captions are another encoder's.
    """
    assert config.cache is not None
    store = LatentStore(Path(config.cache.folder))
    entries = Entries(index=index, config=config, encoder=prints.first_stage, clips=config.cache.clips)

    def check() -> None:
        store.require([entry for _, entry in entries], COMMAND)
        text = TextEmbeddings(store.folder)
        text.require(prints.text, f"run {COMMAND} into another folder")
        text.require_captions(captions_of(index), COMMAND)

    share(check)  # on one rank: it goes through every record, and all see the same folder
    return LatentReader(entries=entries, store=store, draws=draws, conditions=conditions)


def captions_of(index: Index) -> list[str]:
    """All captions of an index's records, each once, and the empty one, which caption dropout asks for."""
    return ["", *dict.fromkeys(c for of_row in index.table["captions"].to_pylist() for c in of_row if c)]
