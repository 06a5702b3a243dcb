"""Samples from a cache: the entries of an index's records, and their latents in place of media."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from sat_ext.data.index import Group, Index
from sat_ext.data.params import DataConfig
from sat_ext.data.visits import Visit, draw_caption, visit_of
from sat_ext.latents.encoders import Fingerprints
from sat_ext.latents.keys import KEY
from sat_ext.latents.store import VERSION, Entry, LatentStore, fingerprint_of
from sat_ext.latents.text import TextEmbeddings
from sat_ext.types import Item, MediaInfo, Sample

COMMAND = "'sat-ext cache --base ...' with the YAML files of this run"
_LOOKED_UP = 1000  # records, at a start that does not go through all


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The entries of an index's records, `clips` of each that a random sampler draws from.

    `encoder` is the first stage's fingerprint.
    """

    index: Index
    config: DataConfig
    encoder: str
    clips: int

    def find(
        self, group: Group, record: int, number: int, known: tuple[Item, MediaInfo, str] | None = None
    ) -> tuple[Visit, Entry]:
        """Visit `number` of a record, and the entry of its latents. `known` is that of `visit_of`."""
        item, whole, fingerprint = known or next(self.index.items(group.rows[record : record + 1]))
        name = f"{group.source}/{item.key}"
        # seeded by the record's name and the draw alone: what is cached stays valid beside other files and shares
        seeds = [self.config.seed, int(fingerprint_of(name)[:16], 16), group.window(record), number % self.clips]
        rng = np.random.default_rng(seeds)
        visit = visit_of(self.index, self.config, group, record, rng, (item, whole, fingerprint))
        times = None if visit.times is None else [round(t, 6) for t in visit.times]
        return visit, Entry(
            name=name, media=fingerprint_of(fingerprint)[:16], clip=fingerprint_of(times, item.crop),
            size=str(group.bucket), encoder=self.encoder,
        )  # fmt: skip

    def keys(self, group: Group) -> np.ndarray:
        """The keys (`KEY`) of a group's samples: all draws of its first record, then those of the next."""
        # records of a row that comes several times in an epoch have one key
        windows = 0 if group.windows is None else group.windows.astype(np.int64)
        _, first, which = np.unique(
            group.rows.astype(np.int64) << 32 | windows, return_index=True, return_inverse=True
        )
        found = (
            bytes.fromhex(self.find(group, record, draw, known)[1].key)
            for record, known in zip(first, self.index.items(group.rows[first]))
            for draw in range(self.clips)
        )
        keys = np.fromiter(found, KEY, len(first) * self.clips)
        return keys.reshape(len(first), self.clips)[which].reshape(-1)

    def __len__(self) -> int:
        return self.clips * sum(len(group.rows) for group in self.index.groups)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that `keys` follow from, but the code of samplers."""
        config, found = self.config, blake2b(digest_size=16)
        options = (config.seed, config.fps, config.short_clips, config.skip_frms_num)
        found.update(fingerprint_of(VERSION, *options, self.index.samplers, self.encoder, self.clips).encode())
        for group in self.index.groups:
            found.update(f"{group.source} {group.bucket} {len(group.rows)}".encode())
            found.update(group.rows.tobytes() + (b"" if group.windows is None else group.windows.tobytes()))
        for batch in self.index.table.to_batches():
            found.update(batch.serialize())
        return found.hexdigest()

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

    def expect(self, coming: Iterable[tuple[Group, Sequence[int]]]) -> None:
        """Nothing: the store is mapped."""

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
    share: Callable[[Callable[[], Any]], Any],
) -> LatentReader:
    """The reader of the cache that `data.params.cache` names, which holds all that a run on `index` asks for.

    `share` calls its argument on the first rank, and returns its result, or raises its error, on every rank.
    Raises `DataError` where the cache lacks something, and `ConfigError` where its captions are another encoder's.
    """
    assert config.cache is not None
    folder = Path(config.cache.folder)
    entries = Entries(index=index, config=config, encoder=prints.first_stage, clips=config.cache.clips)

    def check() -> LatentStore:
        store, text = LatentStore(folder), TextEmbeddings(folder)
        text.require(prints.text, f"run {COMMAND} into another folder")
        if not is_known(entries, store, text):
            keys = np.concatenate([entries.keys(group) for group in index.groups])
            require_all([entries], keys, store, text, COMMAND)
        return store

    # made on one rank: it may go through every record, and all see the same folder; a machine then has it once
    return LatentReader(entries=entries, store=share(check), draws=draws, conditions=conditions)


def require_all(
    of: Sequence[Entries], keys: np.ndarray, store: LatentStore, text: TextEmbeddings, command: str
) -> None:
    """Raise `DataError` unless the cache has all samples and captions, or keep for `is_known` that it has."""
    store.require(keys, lambda number: sample_at(of, number)[1], command)
    text.require_captions(captions_of([entries.index for entries in of]), command)
    for entries in of:
        with suppress(OSError):  # in a folder that cannot be written every start goes through all records
            _mark(entries, store, text).touch()


def is_known(entries: Entries, store: LatentStore, text: TextEmbeddings) -> bool:
    """Whether all records were found before, with the same index, options and files."""
    # some are looked up all the same: a sampler of the user's own may have changed
    some = np.linspace(0, len(entries) - 1, min(len(entries), _LOOKED_UP)).astype(int).tolist()
    return _mark(entries, store, text).exists() and all(
        store.table.find(sample_at([entries], number)[1].key) for number in some
    )


def sample_at(of: Sequence[Entries], number: int) -> tuple[Visit, Entry]:
    """A sample by its place among the keys of all groups."""
    for entries in of:
        for group in entries.index.groups:
            if number < (size := len(group.rows) * entries.clips):
                record, draw = divmod(number, entries.clips)
                return entries.find(group, record, draw)
            number -= size
    raise IndexError(number)


def captions_of(indices: Sequence[Index]) -> pa.Array:
    """All captions of the records of indices, each once, and the empty one, which caption dropout asks for."""
    own = (pc.list_flatten(index.table["captions"]).cast(pa.large_string()).chunks for index in indices)
    return pc.unique(pa.chunked_array([pa.array([""], pa.large_string()), *chain.from_iterable(own)]))


def _mark(entries: Entries, store: LatentStore, text: TextEmbeddings) -> Path:
    """A file that is there once all of the entries' records and captions have been found."""
    found = blake2b(f"{entries.fingerprint} {store.table.state} {text.table.state}".encode(), digest_size=16)
    return store.folder / f"checked-{found.hexdigest()}"
