"""Bytes per part of a host's memory. Pure."""

from collections import Counter
from collections.abc import Iterable

from sat_ext.memory.activations import activations
from sat_ext.memory.counts import Counts
from sat_ext.memory.options import Options
from sat_ext.memory.run import Run
from sat_ext.memory.states import States
from sat_ext.memory.weights import bytes_of, text_bytes
from sat_ext.models.text_offload import REMEMBERED

PROCESS = 3_000_000_000  # a rank with PyTorch, SAT, DeepSpeed and CUDA's libraries, before it holds anything
WORKER = 420_000_000  # a data worker with its guard (README, what is measured)
BATCHES_AHEAD = 2  # of each data worker (PyTorch's prefetch_factor)


def host_parts(
    run: Run, counts: Counts, options: Options, own: States, *, gpus: int, per_node: int
) -> dict[str, int]:
    """Bytes by part of one host with `per_node` ranks that each take what `own` does."""
    frozen = [p for p in counts.network if not p.trains]
    block = bytes_of((p for p in counts.of_block() if not p.trains), run)
    weights, pinned = own.host_weights, list(own.pinned)
    if options.offload_param != "none":
        split = [*frozen, *counts.first_stage, *counts.text]
        each = [-(-p.numel // gpus) * run.itemsize for p in split]
        pinned += each if options.pin_param else []
        weights += sum(each)
    if options.offload_param == "nvme":  # buffers to read into, and what trains as far as it may be kept
        buffers = options.param_buffers * options.param_buffer * run.itemsize
        weights = buffers + min(own.host_weights, options.params_in_cpu * run.itemsize)
        pinned = [*own.pinned, buffers]
    whole = run.model.text.device != "gpu" or run.model.text.quantization != "none"  # each rank holds it
    each_rank = {
        "weights": weights,
        "gradients": own.host_gradients,
        "optimizer": own.host_optimizer,
        "text_encoder": text_bytes(run, counts) * (run.model.text.device != "gpu")
        + REMEMBERED * (whole and not run.cached_text),
        "block_swap": run.model.block_swap * block,
        "checkpoints": sum(checkpoint_memory(run)),
        "pinned": rounding(pinned),
        "data_workers": workers_bytes(run),
        "processes": PROCESS,
    }
    parts = {name: per_node * value for name, value in each_rank.items()}
    # every rank reads the model into CPU memory before it goes to its GPU, or to where it is kept
    model = sum(p.numel for p in (*counts.network, *counts.first_stage)) * run.itemsize + text_bytes(run, counts)
    loading = per_node * (model + PROCESS)
    return {**parts, "loading": max(0, loading - sum(parts.values()))}


def workers_bytes(run: Run) -> int:
    """A rank's data workers, with the batches that wait in them."""
    pixels = max(n * b.frames * 3 * b.height * b.width for b, n in run.batches.items())
    return run.workers * (WORKER + BATCHES_AHEAD * pixels)


def checkpoint_memory(run: Run) -> list[int]:
    """Page-locked bytes of block inputs that are offloaded, by the size of an allocation.

    PyTorch rounds each up to a power of two, and keeps it for a later one of that size: so each size has as many
    as the bucket that needs most of them.
    """
    most: Counter[int] = Counter()
    for bucket in run.batches:
        most |= Counter(map(power_of_two, activations(run, bucket).on_host))
    return [allocation * count for allocation, count in most.items()]


def rounding(allocations: Iterable[int]) -> int:
    """What page-locked memory takes on top: PyTorch's allocator rounds each allocation up to a power of two
    (CachingHostAllocatorImpl in aten/src/ATen/core/CachingHostAllocator.h).

    >>> rounding([5, 8])
    3
    """
    return sum(power_of_two(n) - n for n in allocations if n)


def power_of_two(number: int) -> int:
    """The least that is not below `number`.

    >>> power_of_two(5), power_of_two(8)
    (8, 8)
    """
    return 1 << (number - 1).bit_length()
