"""What DeepSpeed allocates on one rank for weights, gradients and the optimizer. Pure.

Read in deepspeed 0.19.8: `runtime/zero/stage_1_and_2.py`, `stage3.py`, `partition_parameters.py` and
`runtime/fp16/`; `tests/sat/test_memory_states.py` compares with what it allocates on two ranks, to the byte.
With N numbers that train, P ranks, e bytes of the training dtype:

| stage | weights | gradients | fp32 master | moments |
|---|---|---|---|---|
| 0 | e N | e N | 4 N, none if e is 4 | 8 N |
| 1 | e N | e N | 4 N / P, even if e is 4 | 8 N / P |
| 2 | e N | e N / P, in whole parameters | 4 N / P, even if e is 4 | 8 N / P |
| 3 | e N / P | e N / P | 4 N / P, even if e is 4 | 8 N / P |

Groups of ZeRO-1 and 2 are padded to 2 P numbers, and parameters of ZeRO-3, frozen ones too, to P.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from sat_ext.memory.options import ALLREDUCE, Optimizer, Options

MASTER = 4  # bytes: fp32


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of one rank, of what trains.

    `weights`, `master` and `moments` stay on the GPU, `gradients` from the backward pass to the step; `late` more
    are there in the reduction after the backward pass, and `step` more in the optimizer's step. `buffers` are
    there in the backward pass. `host_*` are in CPU memory, `pinned` are those of them that are page-locked, each
    with its own allocation.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    buffers: int
    late: int = 0
    step: int = 0
    host_optimizer: int = 0
    host_gradients: int = 0
    host_weights: int = 0
    pinned: tuple[int, ...] = field(default=())


def states(
    groups: Sequence[Sequence[int]], options: Options, item: int, world: int, rank: int, steps: int
) -> States:
    """The bytes of `rank` of `world` for parameters of these sizes, in their order, by optimizer group.

    `item` is the bytes of the training dtype, `steps` the micro-steps whose gradients are accumulated.
    """
    if not any(groups):
        return States(weights=0, gradients=0, master=0, moments=0, buffers=0)
    if options.stage == 0:
        return _without_zero(groups, options, item)
    if options.stage == 3:
        return _partitioned_weights(groups, options, item, world)
    return _flat_groups(groups, options, item, world, rank, steps)


def moments(optimizer: Optimizer, numbers: int) -> int:
    """Bytes of the optimizer's states for so many numbers."""
    return int(optimizer.states * numbers)


def _without_zero(groups: Sequence[Sequence[int]], options: Options, item: int) -> States:
    numbers = sum(map(sum, groups))
    half = item < MASTER
    # fp32 gradients beside the others, and what a step on lists of tensors takes
    step = (MASTER * half + options.optimizer.step) * numbers
    return States(
        weights=item * numbers,
        gradients=item * numbers,
        master=MASTER * numbers * half,
        moments=moments(options.optimizer, numbers),
        buffers=0,
        late=item * min(numbers, ALLREDUCE),
        step=step,
    )


def _flat_groups(
    groups: Sequence[Sequence[int]], options: Options, item: int, world: int, rank: int, steps: int
) -> States:
    """ZeRO-1 and 2: each group is one flat tensor, of which each rank updates one part."""
    parts = [_padded(sum(group), 2 * world) // world for group in groups]
    part = sum(parts)
    owned = sum(_owned(group, part, rank) for group, part in zip(groups, parts, strict=True))
    numbers, largest = sum(map(sum, groups)), max(map(max, groups))
    bucket = options.reduce_bucket * item
    if options.contiguous or options.offload_optimizer != "none":
        buffers = bucket * (1 + options.overlap)
    else:  # gradients wait for a full bucket, then are copied together
        buffers = 2 * min(bucket, item * numbers)
    weights = item * world * part
    if options.offload_optimizer != "none":
        pinned = [MASTER * p for p in parts] * 2 + [item * p for p in parts] + [item * largest]
        return States(
            weights=weights,
            gradients=item * numbers if options.stage == 1 else 0,
            master=0,
            moments=0,
            buffers=buffers + item * largest,  # through which gradients go to the CPU
            host_optimizer=MASTER * part + moments(options.optimizer, part) + item * part,
            host_gradients=MASTER * part + item * largest + item * owned * (steps > 1),
            pinned=tuple(pinned) if options.pin_optimizer else (),
        )
    accumulated = 2 if steps > 1 and options.stage == 2 else 1  # those of earlier micro-steps beside the new
    padding = (world * part - numbers) * (rank == world - 1)
    gradients = item * (owned * accumulated + padding if options.stage == 2 else numbers)
    if options.fp32_gradients and options.stage == 2 and item < MASTER:
        gradients = MASTER * part  # one flat tensor, which all micro-steps add to
    flat = item if item < MASTER else 0  # of the part's gradients, before they are fp32
    step = max(flat + MASTER, MASTER + options.optimizer.step) * max(parts)
    return States(
        weights=weights,
        gradients=gradients,
        master=MASTER * part,
        moments=moments(options.optimizer, part),
        buffers=buffers,
        # ZeRO-1 copies the part's gradients out of the bucket, as those in it are let go
        late=max(0, item * owned - min(bucket, item * numbers)) if options.stage == 1 else 0,
        step=step - (item * (numbers - owned) if options.stage == 1 else 0),
    )


def _partitioned_weights(groups: Sequence[Sequence[int]], options: Options, item: int, world: int) -> States:
    """ZeRO-3: each parameter is split over the ranks, and gathered while it is used."""
    parts = [[_padded(n, world) // world for n in group] for group in groups]
    part = sum(map(sum, parts))
    sub_groups = [sum(s) for group in parts for s in _sub_groups(group, options.sub_group)]
    bucket = options.reduce_bucket * item
    scattered = min(options.reduce_bucket, sum(map(sum, groups))) * item  # the bucket's, sorted by rank
    buffers = (bucket if options.contiguous else 0) + (scattered if world > 1 else 0)
    half = item < MASTER
    common = moments(options.optimizer, part)
    on_gpu = options.offload_param == "none"
    weights = {"weights": item * part} if on_gpu else {"weights": 0, "host_weights": item * part}
    pinned = [] if on_gpu else [item * sum(group) for group in parts]
    if options.offload_optimizer == "none":
        step = max(item * half + MASTER, MASTER + options.optimizer.step) * max(sub_groups)
        return States(
            **weights,
            gradients=(MASTER if options.fp32_gradients else item) * part,
            master=MASTER * part,
            moments=common,
            buffers=buffers,
            step=step,
            pinned=tuple(pinned),
        )
    pinned += [MASTER * s for s in sub_groups] + [item * part] if options.pin_optimizer else []
    host, gradients = MASTER * part + common, MASTER * part
    if options.offload_optimizer == "nvme":  # buffers of the largest group, for a state each, and its gradients
        gradients = MASTER * max(sub_groups)
        pinned += [gradients] * options.optimizer_buffers
        host = gradients * options.optimizer_buffers
    return States(
        **weights,
        gradients=0,
        master=0,
        moments=0,
        buffers=buffers,
        host_optimizer=host,
        host_gradients=item * part + gradients,
        pinned=tuple(pinned),
    )


def persistent(sizes: Iterable[int], options: Options, item: int, world: int) -> int:
    """Bytes of the small parameters that ZeRO-3 keeps whole on each GPU, beside their parts."""
    if options.stage < 3 or world == 1 and options.offload_param == "none":
        return 0
    total = 0
    for numbers in sizes:
        if numbers <= options.persistence and numbers + total <= options.model_persistence:
            total += numbers
    return item * total


def _padded(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple


def _owned(group: Sequence[int], part: int, rank: int) -> int:
    """Numbers of the parameters that are in the rank's part of a flat group, also of those that reach out of it.

    >>> _owned([3, 5, 4], 6, 0), _owned([3, 5, 4], 6, 1)
    (8, 9)
    """
    start, end = rank * part, (rank + 1) * part
    ends = list(accumulate(group))
    return sum(n for n, last in zip(group, ends, strict=True) if last > start and last - n < end)


def _sub_groups(group: Sequence[int], largest: int) -> list[list[int]]:
    """As `_create_fp16_sub_groups`: a sub-group ends with the parameter that fills it."""
    if largest >= sum(group):
        return [list(group)]
    groups: list[list[int]] = [[]]
    for numbers in group:
        if sum(groups[-1]) >= largest:
            groups.append([])
        groups[-1].append(numbers)
    return groups
