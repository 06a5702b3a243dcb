"""Bytes per part of a host's memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from sat_ext.memory.activations import activations
from sat_ext.memory.counts import Counts
from sat_ext.memory.options import Options
from sat_ext.memory.run import Run, sizes
from sat_ext.memory.states import States
from sat_ext.memory.weights import bytes_of, text_bytes

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
    checkpoints = max(activations(run, sizes(run, bucket)).on_host for bucket in run.batches)
    pixels = max(n * b.frames * 3 * b.height * b.width for b, n in run.batches.items())
    each_rank = {
        "weights": weights,
        "gradients": own.host_gradients,
        "optimizer": own.host_optimizer,
        "text_encoder": text_bytes(run, counts) * (run.model.text.device != "gpu"),
        "block_swap": run.model.block_swap * block,
        "checkpoints": checkpoints,
        "pinned": rounding(pinned),
        "data_workers": run.workers * (WORKER + BATCHES_AHEAD * pixels),
        "processes": PROCESS,
    }
    parts = {name: per_node * value for name, value in each_rank.items()}
    # every rank reads the model into CPU memory before it goes to its GPU, or to where it is kept
    model = sum(p.numel for p in (*counts.network, *counts.first_stage)) * run.itemsize + text_bytes(run, counts)
    loading = per_node * (model + PROCESS)
    return {**parts, "loading": max(0, loading - sum(parts.values()))}


def rounding(allocations: Iterable[int]) -> int:
    """What page-locked memory takes on top: PyTorch's allocator rounds each allocation up to a power of two
    (CachingHostAllocatorImpl in aten/src/ATen/core/CachingHostAllocator.h).

    >>> rounding([5, 8])
    3
    """
    return sum((1 << (n - 1).bit_length()) - n for n in allocations if n)
