"""Bytes per part of a GPU and of a host, for one run under one configuration of DeepSpeed. Pure but for counting.

A training step has phases, of which one is the peak: the encoding of pixels, of captions, the backward pass, the
reduction of gradients, the optimizer's step, and where samples are made their decoding. The parts of a GPU are
what the backward pass holds, and a phase that needs more adds to its own part what it needs on top. So parts add
up to the peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sat_ext.memory.activations import activations
from sat_ext.memory.counts import Counts, count
from sat_ext.memory.host import host_parts
from sat_ext.memory.measured import decoding, embedding, encoding
from sat_ext.memory.options import Options, read_options
from sat_ext.memory.run import Run
from sat_ext.memory.states import States, persistent, states
from sat_ext.memory.weights import bytes_of, text_bytes
from sat_ext.types import Bucket

# Not in PyTorch's count of what it allocated: the CUDA context with the loaded kernels, and NCCL's buffers where
# there are other GPUs. Half a gigabyte and 0.4 GB are what is commonly seen on A100 and H100.
CONTEXT, COMMUNICATION = 500_000_000, 400_000_000
FRAGMENTATION = 0.05  # of what comes and goes in a step: PyTorch's allocator cannot reuse all of it at once

FETCHED = 2  # blocks at a time, of those that wait in CPU memory


@dataclass(frozen=True, kw_only=True)
class BucketPeak:
    """The peak of micro-steps of one bucket on a GPU, without the allowance that PyTorch does not count."""

    bucket: Bucket
    samples: int
    activations: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes: bytes by part, of the rank that takes most and of a host with its GPUs.

    `node`: the configuration is for several nodes of so many GPUs; 1 is for any number.
    """

    name: str
    per_gpu: Mapping[str, int]
    per_host: Mapping[str, int]
    buckets: tuple[BucketPeak, ...]
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
class _Static:
    """What is on the GPU all the time, by part."""

    weights: int
    optimizer: int
    first_stage: int
    text: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.first_stage + self.text + self.buffers


def make_plan(run: Run, *, gpus: int = 1, per_node: int | None = None, name: str = "given") -> Plan:
    """Predict what `run` takes on `gpus` GPUs, `per_node` in each host (all where it is None)."""
    transformer, per_node = run.model.transformer, min(per_node or gpus, gpus)
    counts = count(run)
    options = read_options(run.deepspeed, transformer.num_attention_heads * transformer.attention_head_dim)
    # where ranks differ, it is by what reaches over the ends of their parts
    each = [
        states(counts.groups, options, run.itemsize, gpus, rank, run.accumulation)
        for rank in sorted({0, gpus // 2, gpus - 1})
    ]
    own = max(each, key=lambda s: s.weights + s.gradients + s.master + s.moments)
    static = _static(run, counts, options, own, gpus)
    per_bucket = [_phases(run, counts, options, own, static, gpus, bucket) for bucket in run.batches]
    phases = {phase: max(p[phase] for p in per_bucket) for phase in per_bucket[0]}
    dynamic = phases["backward"] - static.total
    buffers = own.buffers * (options.stage < 3)
    parts = {
        "weights": static.weights,
        "gradients": own.gradients,
        "optimizer": static.optimizer,
        "activations": max(0, dynamic - own.gradients - buffers),
        "first_stage": static.first_stage,
        "text_encoder": static.text,
        "buffers": static.buffers + buffers,
    }
    so_far = sum(parts.values())
    for phase, part in (
        ("encode", "first_stage"), ("text", "text_encoder"), ("reduce", "buffers"), ("step", "optimizer"),
        ("sample", "first_stage"),
    ):  # fmt: skip
        parts[part] += max(0, phases[phase] - so_far)
        so_far = max(so_far, phases[phase])
    fragments = int(FRAGMENTATION * max(0, so_far - static.total))
    parts["overhead"] = CONTEXT + COMMUNICATION * (gpus > 1) + fragments
    peaks = tuple(
        BucketPeak(
            bucket=bucket,
            samples=run.batches[bucket],
            activations=activations(run, bucket).on_gpu,
            peak=max(found.values()),
        )
        for bucket, found in zip(run.batches, per_bucket, strict=True)
    )
    host = host_parts(run, counts, options, own, gpus=gpus, per_node=per_node)
    return Plan(name=name, per_gpu=parts, per_host=host, buckets=peaks, node=options.node)


def _static(run: Run, counts: Counts, options: Options, own: States, gpus: int) -> _Static:
    frozen = [p for p in counts.network if not p.trains]
    split = gpus if options.stage == 3 else 1
    on_gpu = options.offload_param == "none"
    weights = bytes_of(frozen, run, split) * on_gpu + own.weights + counts.buffers * run.itemsize
    if run.model.block_swap:
        block = bytes_of((p for p in counts.of_block() if not p.trains), run)
        weights -= max(0, run.model.block_swap - FETCHED) * block
    everything = (*counts.network, *counts.first_stage, *counts.text)
    buffers = 0
    if options.stage == 3:
        buffers = own.buffers + persistent((p.numel for p in everything), options, run.itemsize, gpus)
        if gpus > 1 or not on_gpu:  # those that are gathered for the blocks that compute, and ahead of them
            gathered = min(options.max_live + options.prefetch, sum(p.numel for p in counts.network))
            buffers += gathered * run.itemsize
        if options.node > 1:
            buffers += sum(-(-p.numel // options.node) for p in everything) * run.itemsize
    kept = run.model.text.device == "gpu"
    return _Static(
        weights=weights,
        optimizer=own.master + own.moments,
        first_stage=on_gpu * run.itemsize * sum(-(-p.numel // split) for p in counts.first_stage),
        text=on_gpu * kept * text_bytes(run, counts, split),
        buffers=buffers,
    )


def _phases(
    run: Run, counts: Counts, options: Options, own: States, static: _Static, gpus: int, bucket: Bucket
) -> dict[str, int]:
    """Bytes on the GPU in each phase of a micro-step of `bucket`."""
    live = activations(run, bucket)
    kept = own.gradients if run.accumulation > 1 else 0  # of the micro-steps before
    before = own.gradients if options.stage >= 2 else kept  # without ZeRO and in ZeRO-1 they come block by block
    buffers = own.buffers * (options.stage < 3)
    visiting = text_bytes(run, counts) if run.model.text.device == "on_off" else 0
    return {
        "encode": static.total + kept + encoding(run, bucket),
        "text": static.total + kept + visiting + embedding(run, bucket),
        "backward": static.total + buffers + max(live.on_gpu + before, live.at_end + own.gradients),
        "reduce": static.total + buffers + own.gradients + own.late,
        "step": static.total + own.gradients + own.step,
        "sample": static.total + decoding(run, bucket),
    }
