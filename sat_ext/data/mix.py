"""`data.params.mix`: shares by kind, for sources that hold stills and clips together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

from sat_ext.data.clips import find_sampler
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import ConfigError, DataError
from sat_ext.types import KINDS, Kind, MixPart


def parts_of(sources: Sequence[SourceConfig], mix: Mapping[MixPart, float]) -> tuple[SourceConfig, ...]:
    """Each source once for each part of the mix that it can have. Raises `ConfigError` for a sampler of stills.

    >>> parts = parts_of([SourceConfig(path="data/all")], {"image": 1, "first_frame": 2})
    >>> [(p.name, p.kind, p.sampler) for p in parts]
    [('all:image', 'image', 'random_start'), ('all:first_frame', 'video', 'first_frame')]
    """
    found = []
    for source in sources:
        if find_sampler(source.sampler).still:
            raise ConfigError(
                f"data.params.mix: all of '{source.path}' would be stills, as its sampler is '{source.sampler}'; "
                "leave the sampler out and add first_frame to the mix, or give shares to sources instead."
            )
        name = source.name or PurePath(source.path).stem
        for part in mix:
            kind: Kind = "image" if part == "image" else "video"
            if source.kind in (None, kind):
                sampler = "first_frame" if part == "first_frame" else source.sampler
                found.append(replace(source, name=f"{name}:{part}", kind=kind, sampler=sampler, part=part))
    return tuple(found)


def shares_of(
    sources: Mapping[str, SourceConfig], records: Mapping[str, int], mix: Mapping[MixPart, float] | None
) -> dict[str, float]:
    """The share of each source by name: its own, or as many as it has `records`.

    With a `mix`, the sources of each of its parts together have the part's share. Raises `DataError` for a part
    that no source has.
    """
    shares = {n: float(records[n]) if s.share is None else s.share for n, s in sources.items()}
    if not any(s.part for s in sources.values()):
        return shares
    for part, wanted in (mix or {}).items():
        own = [n for n, s in sources.items() if s.part == part]
        if not own:
            what = KINDS["image" if part == "image" else "video"]
            raise DataError(
                f"data.params.mix: {part} is to have a share of {wanted:g}, but no source has {what} that can be "
                "used; add some, or take it out of the mix."
            )
        total = sum(shares[n] for n in own)
        shares |= {n: wanted * shares[n] / total for n in own}
    return shares
