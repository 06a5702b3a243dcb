"""Probing by all ranks of a run: each probes a part of the files that are not known yet."""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch.distributed as dist

from sat_ext.data.index.probing import Outcome, probe_files
from sat_ext.errors import MediaError
from sat_ext.sat.broadcast import on_all_ranks

ROUND = 4096  # files of one rank between two exchanges: each starts processes
MOST = 1 << 18  # files of all ranks between two exchanges: the first holds what was found as Python objects
SECONDS = 20.0  # after which a rank reports what it has: the others wait for it, for a limited time


def probe_on_all_ranks(paths: Iterable[str], **options: Any) -> Iterator[Outcome]:
    """`probe_files`, by all ranks. To be called inside `make` of `share_from_first_rank`.

    What another rank cannot read is probed again by the first: a mount may be missing on that machine, and the
    index must not depend on who probes.
    """
    world = dist.get_world_size()
    if world == 1:
        yield from probe_files(paths, **options)
        return
    remaining = iter(paths)
    while some := list(islice(remaining, min(MOST, ROUND * world))):
        found: dict[str, Outcome] = {}
        doubtful: list[str] = []
        while rest := [path for path in some if path not in found]:
            parts = [rest[rank::world] for rank in range(world)]
            for rank, outcomes in enumerate(on_all_ranks(partial(_probe_some, **options), parts)):
                own = dict(zip(parts[rank], outcomes))  # perhaps not the whole part
                found |= own
                doubtful += [path for path, (what, _) in own.items() if rank and isinstance(what, MediaError)]
        found |= zip(doubtful, probe_files(doubtful, **options))
        yield from (found[path] for path in some)


def _probe_some(paths: Sequence[str], **options: Any) -> list[Outcome]:
    """Of the first of `paths`, as many as there is time for, and at least one."""
    outcomes, end = [], time.monotonic() + SECONDS
    for outcome in probe_files(paths, **options):
        outcomes.append(outcome)
        if time.monotonic() > end:
            break
    return outcomes
