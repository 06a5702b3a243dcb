"""What DeepSpeed allocates on one rank for weights, gradients and the optimizer, to the byte.

Read in deepspeed 0.19.8: `runtime/zero/stage_1_and_2.py`, `stage3.py`, `partition_parameters.py` and
`runtime/fp16/`; `tests/sat/test_memory_states.py` compares with what it allocates on two ranks.
With N numbers that train, P ranks, e bytes of the training dtype:

| stage | weights | gradients | fp32 master | moments |
|---|---|---|---|---|
| 0 | e N | e N | 4 N, none if e is 4 | 8 N |
| 1 | e N | e N | 4 N / P, even if e is 4 | 8 N / P |
| 2 | e N | e N / P, in whole parameters | 4 N / P, even if e is 4 | 8 N / P |
| 3 | e N / P | e N / P | 4 N / P, even if e is 4 | 8 N / P |

Groups of ZeRO-1 and 2 are padded to 2 P numbers, and parameters of ZeRO-3, frozen ones too, to P."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sat_ext.memory.run import Options

MASTER = 4  # bytes: fp32
# numbers that are reduced at a time without ZeRO (MEMORY_OPT_ALLREDUCE_SIZE in deepspeed/runtime/engine.py)
ALLREDUCE = 500_000_000


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes on one rank for what trains.

    `weights`, `master` and `moments` stay on the GPU, `gradients` from the backward pass to the step, and
    `buffers` during the backward pass. The reduction after it takes `late` more, the optimizer's step `step` more.
    `host_*` are in CPU memory; `pinned` are the page-locked allocations among them."""

    weights: int = 0
    gradients: int = 0
    master: int = 0
    moments: int = 0
    buffers: int = 0
    late: int = 0
    step: int = 0
    host_optimizer: int = 0
    host_gradients: int = 0
    host_weights: int = 0
    pinned: tuple[int, ...] = ()


def states(
    groups: Sequence[Sequence[int]], options: Options, item: int, world: int, rank: int, steps: int
) -> States:
    """The bytes of `rank` of `world` for parameters of these sizes, in their order, by optimizer group.

    `item` is the bytes of the training dtype, `steps` the micro-steps whose gradients are accumulated."""
    if not any(groups):
        return States()
    if options.stage == 0:
        return _without_zero(groups, options, item)
    if options.stage == 3:
        return _partitioned_weights(groups, options, item, world)
    return _flat_groups(groups, options, item, world, rank, steps)


def _without_zero(groups: Sequence[Sequence[int]], options: Options, item: int) -> States:
    numbers, half = sum(map(sum, groups)), item < MASTER
    return States(
        weights=item * numbers,
        gradients=item * numbers,
        master=MASTER * numbers * half,
        moments=_moments(options, numbers),
        late=item * min(numbers, ALLREDUCE),
        step=(MASTER * half + options.optimizer.step) * numbers,  # with fp32 gradients beside the others
    )


def _flat_groups(
    groups: Sequence[Sequence[int]], options: Options, item: int, world: int, rank: int, steps: int
) -> States:
    """ZeRO-1 and 2: each group is one flat tensor, and each rank updates one part of it."""
    parts = [_padded(sum(group), 2 * world) // world for group in groups]
    part = sum(parts)
    owned = sum(_owned(group, part, rank) for group, part in zip(groups, parts, strict=True))
    numbers, largest = sum(map(sum, groups)), max(map(max, groups))
    bucket = options.reduce_bucket_size * item
    is_offloaded = options.offload_optimizer.device != "none"
    if options.contiguous_gradients or is_offloaded:
        buffers = bucket * (1 + options.overlap_comm)
    else:  # gradients wait for a full bucket, and are then copied together
        buffers = 2 * min(bucket, item * numbers)
    weights = item * world * part
    if is_offloaded:
        pinned = (*[MASTER * p for p in parts] * 2, *(item * p for p in parts), item * largest)
        return States(
            weights=weights,
            gradients=item * numbers if options.stage == 1 else 0,
            buffers=buffers + item * largest,  # gradients pass through it to the CPU
            host_optimizer=MASTER * part + _moments(options, part) + item * part,
            host_gradients=MASTER * part + item * largest + item * owned * (steps > 1),
            pinned=pinned if options.offload_optimizer.pin_memory else (),
        )
    if options.stage == 1:
        gradients, late = item * numbers, max(0, item * owned - min(bucket, item * numbers))
    elif options.fp32_gradients and item < MASTER:
        gradients, late = MASTER * part, 0  # one flat tensor, to which all micro-steps add
    else:
        accumulated = 2 if steps > 1 else 1  # the sum of earlier micro-steps, beside the new ones
        padding = (world * part - numbers) * (rank == world - 1)
        gradients, late = item * (owned * accumulated + padding), 0
    flat = item if item < MASTER else 0  # the part's gradients, before they are cast to fp32
    step = max(flat + MASTER, MASTER + options.optimizer.step) * max(parts)
    return States(
        weights=weights,
        gradients=gradients,
        master=MASTER * part,
        moments=_moments(options, part),
        buffers=buffers,
        late=late,  # ZeRO-1 copies the part's gradients out of the bucket while the bucket's are freed
        step=step - (item * (numbers - owned) if options.stage == 1 else 0),
    )


def _partitioned_weights(groups: Sequence[Sequence[int]], options: Options, item: int, world: int) -> States:
    """ZeRO-3: each parameter is split over the ranks, and gathered while it is used."""
    parts = [[_padded(n, world) // world for n in group] for group in groups]
    part = sum(map(sum, parts))
    sub_groups = [sum(s) for group in parts for s in _sub_groups(group, options.sub_group_size)]
    bucket = options.reduce_bucket_size * item
    scattered = min(options.reduce_bucket_size, sum(map(sum, groups))) * item  # the bucket's, sorted by rank
    buffers = (bucket if options.contiguous_gradients else 0) + (scattered if world > 1 else 0)
    moments, on_gpu = _moments(options, part), options.offload_param.device == "none"
    weights, host_weights = (item * part, 0) if on_gpu else (0, item * part)
    pinned = () if on_gpu else tuple(item * sum(group) for group in parts)
    offload = options.offload_optimizer
    if offload.device == "none":
        gradient = item if item < MASTER else 0  # the sub-group's, before they are cast to fp32
        return States(
            weights=weights,
            gradients=(MASTER if options.fp32_gradients else item) * part,
            master=MASTER * part,
            moments=moments,
            buffers=buffers,
            step=max(gradient + MASTER, MASTER + options.optimizer.step) * max(sub_groups),
            host_weights=host_weights,
            pinned=pinned,
        )
    optimizer, gradients = MASTER * part + moments, MASTER * part
    if offload.pin_memory:
        pinned += (*(MASTER * s for s in sub_groups), item * part)
    if offload.device == "nvme":  # buffers of the largest sub-group's size, for each state and its gradients
        gradients = MASTER * max(sub_groups)
        pinned += (gradients,) * offload.buffer_count
        optimizer = gradients * offload.buffer_count
    return States(
        weights=weights, buffers=buffers, host_optimizer=optimizer, host_gradients=item * part + gradients,
        host_weights=host_weights, pinned=pinned,
    )  # fmt: skip


def persistent(sizes: Iterable[int], options: Options, item: int, world: int) -> int:
    """Bytes of the small parameters that ZeRO-3 keeps whole on each GPU, beside their parts."""
    if options.stage < 3 or world == 1 and options.offload_param.device == "none":
        return 0
    total = 0
    for numbers in sizes:
        fits = numbers + total <= options.model_persistence_threshold
        if fits and numbers <= options.param_persistence_threshold:
            total += numbers
    return item * total


def _moments(options: Options, numbers: int) -> int:
    return int(options.optimizer.states * numbers)


def _padded(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple


def _owned(group: Sequence[int], part: int, rank: int) -> int:
    """Numbers of the parameters that overlap the rank's part of a flat group, each counted whole.

    >>> _owned([3, 5, 4], 6, 0), _owned([3, 5, 4], 6, 1)
    (8, 9)
    """
    start, end = rank * part, (rank + 1) * part
    return sum(n for n, last in zip(group, accumulate(group), strict=True) if last > start and last - n < end)


def _sub_groups(group: Sequence[int], largest: int) -> list[list[int]]:
    """As `_create_fp16_sub_groups`: a sub-group ends with the parameter that fills it."""
    groups: list[list[int]] = [[]]
    for numbers in group:
        if sum(groups[-1]) >= largest:
            groups.append([])
        groups[-1].append(numbers)
    return groups
