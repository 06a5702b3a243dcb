"""Bytes per part of a GPU and of a host, for a run under one configuration of DeepSpeed and for `sat-ext cache`.

A training step has phases, one of which is the peak: encoding of pixels, of captions, the backward pass, the
reduction of gradients, the optimizer's step, and the decoding of samples if a run makes any. The parts of a GPU
are what the backward pass holds; a phase that needs more adds the difference to its own part. So the parts add up
to the peak."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sat_ext.memory.counts import Counts, bytes_of, count, text_bytes
from sat_ext.memory.measured import activations, decoding, embedding, encoding
from sat_ext.memory.run import Run
from sat_ext.memory.states import States, persistent, states
from sat_ext.models.folder import BLOCKS_FETCHED
from sat_ext.models.text_offload import REMEMBERED
from sat_ext.types import Bucket

# Not in PyTorch's count of what it allocated: the CUDA context with the loaded kernels, and with other GPUs NCCL's
# buffers. Half a gigabyte and 0.4 GB are what is commonly seen on A100 and H100.
CONTEXT, COMMUNICATION = 500_000_000, 400_000_000
FRAGMENTATION = 0.05  # of what comes and goes in a step: PyTorch's allocator cannot reuse all of it at once

PROCESS = 3_000_000_000  # a rank with PyTorch, SAT, DeepSpeed and CUDA's libraries, before it holds anything
WORKER = 420_000_000  # a data worker with its guard (README, what is measured)
BATCHES_AHEAD = 2  # of each data worker (PyTorch's prefetch_factor)
CAPTIONS = 16  # that `write_text_embeddings` hands to the encoder at a time


@dataclass(frozen=True, kw_only=True)
class BucketPeak:
    """The peak of the largest micro-step with one bucket on a GPU, as PyTorch counts it; `step` is its samples by
    bucket."""

    bucket: Bucket
    step: Mapping[Bucket, int]
    activations: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a run by part, of the rank that takes most and of a host with its GPUs.

    `slowdown`: how many times as long as without ZeRO and offload a step takes. `node`: the configuration is for
    several nodes of so many GPUs; 1 is for any number."""

    name: str
    per_gpu: Mapping[str, int]
    per_host: Mapping[str, int]
    buckets: tuple[BucketPeak, ...]
    slowdown: float = 1.0
    node: int = 1

    @property
    def gpu(self) -> int:
        """All of a GPU's parts."""
        return sum(self.per_gpu.values())

    @property
    def host(self) -> int:
        """All of a host's parts."""
        return sum(self.per_host.values())


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Bytes of a GPU while captions are embedded (`text`) and while samples are encoded (`first_stage`), and of a
    host. `levers` are lines of YAML that it assumes beside those of the run."""

    text: int
    first_stage: int
    host: int
    levers: tuple[str, ...] = ()

    @property
    def gpu(self) -> int:
        """The larger of the two: one encoder is freed before the other is loaded."""
        return max(self.text, self.first_stage)


def make_plan(run: Run, *, gpus: int = 1, per_node: int | None = None, name: str = "given") -> Plan:
    """Predict what `run` takes on `gpus` GPUs, `per_node` in each host (None: all)."""
    counts, options = count(run), run.options
    # ranks differ by the parameters that overlap the ends of their parts
    ranks = sorted({0, gpus // 2, gpus - 1})
    each = [states(counts.groups, options, run.itemsize, gpus, rank, run.accumulation) for rank in ranks]
    own = max(each, key=lambda s: s.weights + s.gradients + s.master + s.moments)
    static = _static(run, counts, own, gpus)
    held = sum(static.values())
    per_bucket = [_phases(run, counts, own, held, bucket) for bucket in run.steps]
    phases = {phase: max(p[phase] for p in per_bucket) for phase in per_bucket[0]}
    buffers = own.buffers * (options.stage < 3)
    parts = {
        "weights": static["weights"],
        "gradients": own.gradients,
        "optimizer": static["optimizer"],
        "activations": max(0, phases["backward"] - held - own.gradients - buffers),
        "first_stage": static["first_stage"],
        "text_encoder": static["text_encoder"],
        "buffers": static["buffers"] + buffers,
    }
    so_far = sum(parts.values())
    for phase, part in (
        ("encode", "first_stage"), ("text", "text_encoder"), ("reduce", "buffers"), ("step", "optimizer"),
        ("sample", "first_stage"),
    ):  # fmt: skip
        parts[part] += max(0, phases[phase] - so_far)
        so_far = max(so_far, phases[phase])
    parts["overhead"] = CONTEXT + COMMUNICATION * (gpus > 1) + int(FRAGMENTATION * max(0, so_far - held))
    peaks = tuple(
        BucketPeak(bucket=b, step=step, activations=activations(run, b).on_gpu, peak=max(found.values()))
        for (b, step), found in zip(run.steps.items(), per_bucket, strict=True)
    )
    host = _host_parts(run, counts, own, gpus, min(per_node or gpus, gpus))
    return Plan(name=name, per_gpu=parts, per_host=host, buckets=peaks, node=options.zero_hpz_partition_size)


def _static(run: Run, counts: Counts, own: States, gpus: int) -> dict[str, int]:
    """What is on the GPU all the time."""
    options = run.options
    split = gpus if options.stage == 3 else 1
    on_gpu = options.offload_param.device == "none"
    weights = bytes_of(counts.frozen, run, split) * on_gpu + own.weights + counts.buffers * run.itemsize
    weights -= max(0, run.model.block_swap - BLOCKS_FETCHED) * bytes_of(counts.frozen_block, run)
    everything = (*counts.network, *counts.first_stage, *counts.text)
    buffers = 0
    if options.stage == 3:
        buffers = own.buffers + persistent((p.numel for p in everything), options, run.itemsize, gpus)
        if gpus > 1 or not on_gpu:  # weights that are gathered for the blocks that compute, and ahead of them
            ahead = options.max_live_parameters + options.prefetch_bucket_size
            buffers += min(ahead, sum(p.numel for p in counts.network)) * run.itemsize
        if options.zero_hpz_partition_size > 1:
            buffers += sum(-(-p.numel // options.zero_hpz_partition_size) for p in everything) * run.itemsize
    return {
        "weights": weights,
        "optimizer": own.master + own.moments,
        "first_stage": on_gpu * run.itemsize * sum(-(-p.numel // split) for p in counts.first_stage),
        "text_encoder": on_gpu * (run.model.text.device == "gpu") * text_bytes(run, counts, split),
        "buffers": buffers,
    }


def _phases(run: Run, counts: Counts, own: States, held: int, bucket: Bucket) -> dict[str, int]:
    """Bytes on the GPU in each phase of a micro-step of `bucket`, with the `held` bytes that are always there."""
    live, stage = activations(run, bucket), run.options.stage
    kept = own.gradients if run.accumulation > 1 else 0  # from earlier micro-steps
    before = own.gradients if stage >= 2 else kept  # without ZeRO and in ZeRO-1 they come block by block
    buffers = own.buffers * (stage < 3)
    visiting = text_bytes(run, counts) if run.model.text.device == "on_off" else 0
    return {
        "encode": held + kept + encoding(run, bucket),
        "text": held + kept + visiting + embedding(run, bucket),
        "backward": held + buffers + max(live.on_gpu + before, live.at_end + own.gradients),
        "reduce": held + buffers + own.gradients + own.late,
        "step": held + own.gradients + own.step,
        "sample": held + decoding(run, bucket),
    }


def _host_parts(run: Run, counts: Counts, own: States, gpus: int, per_node: int) -> dict[str, int]:
    """Bytes by part of one host with `per_node` ranks."""
    options, text = run.options, run.model.text
    param = options.offload_param
    weights, pinned = own.host_weights, list(own.pinned)
    if param.device == "cpu":
        split = [*counts.frozen, *counts.first_stage, *counts.text]
        each = [-(-p.numel // gpus) * run.itemsize for p in split]
        pinned += each if param.pin_memory else []
        weights += sum(each)
    elif param.device == "nvme":  # buffers to read into, and trained weights as far as they may stay
        buffers = param.buffer_count * param.buffer_size * run.itemsize
        weights = buffers + min(own.host_weights, param.max_in_cpu * run.itemsize)
        pinned.append(buffers)
    encoder = text_bytes(run, counts)
    # these encoders are whole on each rank, which remembers embeddings
    whole = text.device != "gpu" or text.quantization != "none"
    each_rank = {
        "weights": weights,
        "gradients": own.host_gradients,
        "optimizer": own.host_optimizer,
        "text_encoder": encoder * (text.device != "gpu") + REMEMBERED * (whole and not run.cached_text),
        "block_swap": run.model.block_swap * bytes_of(counts.frozen_block, run),
        "checkpoints": sum(checkpoint_memory(run)),
        "pinned": rounding(pinned),
        "data_workers": _workers_bytes(run),
        "processes": PROCESS,
    }
    parts = {name: per_node * value for name, value in each_rank.items()}
    # every rank reads the model into CPU memory, before it goes to its GPU or stays
    model = sum(p.numel for p in (*counts.network, *counts.first_stage)) * run.itemsize + encoder
    loading = per_node * (model + PROCESS)
    return {**parts, "loading": max(0, loading - sum(parts.values()))}


def _workers_bytes(run: Run) -> int:
    """A rank's data workers, with the batches that wait in them."""
    pixels = max(sum(n * b.frames * 3 * b.height * b.width for b, n in of.items()) for of in run.steps.values())
    return run.workers * (WORKER + BATCHES_AHEAD * pixels)


def checkpoint_memory(run: Run) -> list[int]:
    """Page-locked bytes of the block inputs that are offloaded, by the size of an allocation.

    PyTorch rounds each up to a power of two, and keeps it for another of that size. So each size has as many as
    the bucket that needs most of them."""
    most: Counter[int] = Counter()
    for bucket in run.steps:
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
    """The smallest that is at least `number`.

    >>> power_of_two(5), power_of_two(8)
    (8, 8)
    """
    return 1 << (number - 1).bit_length()


def plan_cache(run: Run, per_node: int) -> CachePlan:
    """What it takes to make the cache of `run`, with `per_node` GPUs in each host."""
    # one sample at a time; the run's YAML may already name the cache that is about to be made
    run = replace(run, cached=False, cached_text=False, steps={b: {b: 1} for b in run.steps})
    counts = count(run)
    text = text_bytes(run, counts)
    together = CAPTIONS if run.is_cogvideo or run.model.text.device == "gpu" else 1
    captions = max(embedding(replace(run, steps={b: {b: together}}), b) for b in run.steps)
    autoencoder = sum(p.numel for p in counts.first_stage) * run.itemsize
    pixels = max(encoding(run, bucket) for bucket in run.steps)
    on_gpu = run.model.text.device != "cpu"
    return CachePlan(
        text=on_gpu * (CONTEXT + text + int((1 + FRAGMENTATION) * captions)),
        first_stage=CONTEXT + autoencoder + int((1 + FRAGMENTATION) * pixels),
        host=per_node * (PROCESS + max(text, autoencoder + _workers_bytes(run))),
    )
