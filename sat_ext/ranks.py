"""This process among the ranks of a run, and what all of them must agree on."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from sat_ext.errors import SatExtError

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """(0, 1) for a process without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_ranks(otherwise: int = 1) -> int:
    """The ranks on this machine; `otherwise` without a launcher."""
    # the first is torchrun's, the second the DeepSpeed launcher's
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or otherwise)


def gather(value: T) -> list[T]:
    """The `value` of every rank, in their order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_every_rank(call: Callable[[], T]) -> T:
    """The result of `call`. A `SatExtError` of one rank is raised on all: the others would wait for it forever."""
    result, own = None, None
    try:
        result = call()
    except SatExtError as error:
        own = error
    if errors := [error for error in gather(own) if error is not None]:
        raise errors[0] from own
    return cast(T, result)
