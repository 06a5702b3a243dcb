"""Which ZeRO configuration to use, what it costs, and which lever to pull where none fits. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sat_ext.cogvideo.network import PRETRAINED
from sat_ext.cogvideox import tokens
from sat_ext.memory.counts import count
from sat_ext.memory.options import read_options
from sat_ext.memory.plan import Plan, make_plan
from sat_ext.memory.run import Run
from sat_ext.models.config import GradientCheckpointing
from sat_ext.zero import ZERO_NAMES, zero_section

# The rule of thumb's rates, for one GPU. They decide between configurations; they promise no step time.
COMPUTE = 150e12  # FLOP a second that training reaches in bf16 (about half of an A100's peak)
LINK = 25e9  # bytes a second between GPUs, and between a GPU and CPU memory, each way (PCIe 4.0 x16)
DISK = 3e9  # bytes a second of an NVMe disk
CPU_ADAM = 0.25e-9  # seconds a number of DeepSpeed's Adam on the CPU (Ren et al. 2021, "ZeRO-Offload")
RULE = (
    "slower: estimated from FLOP at 150 TFLOP/s and bytes moved at 25 GB/s (PCIe 4.0); ZeRO-1 and 2 send as much "
    "as plain data parallelism, ZeRO-3 1.5 times (Rajbhandari et al. 2020, section 7)"
)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is: `per_node` GPUs in each host, and bytes of memory of each GPU and each host."""

    gpus: int
    per_node: int
    gpu_memory: int
    host_memory: int

    def lacks(self, plan: Plan) -> list[str]:
        """What there is too little of for `plan`."""
        nodes = plan.node == 1 or (self.gpus > plan.node and self.gpus % plan.node == 0)
        short = {"nodes": not nodes, "GPU": plan.gpu > self.gpu_memory, "host": plan.host > self.host_memory}
        return [name for name, lacking in short.items() if lacking]

    def holds(self, plan: Plan) -> bool:
        """Whether there is enough of all."""
        return not self.lacks(plan)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """`plans` of the configuration as given, then of each of ZeRO; `slowdowns` by their names.

    `recommended` is the name of a plan that fits, or None. Then `levers` are lines of YAML with which
    `with_levers` fits, or None where nothing does.
    """

    plans: tuple[Plan, ...]
    slowdowns: Mapping[str, float]
    recommended: str | None
    levers: tuple[str, ...] = ()
    with_levers: Plan | None = None


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A lever as YAML, and the run with it, or None where it is pulled already or makes no sense."""

    yaml: str
    pull: Callable[[Run], Run | None]


def advise(run: Run, room: Room) -> Advice:
    """Plan `run` as given and under every ZeRO configuration, and choose."""
    given = make_plan(run, gpus=room.gpus, per_node=room.per_node)
    runs = {name: changed for name in ZERO_NAMES if (changed := with_zero(run, name)) is not None}
    plans = [make_plan(r, gpus=room.gpus, per_node=room.per_node, name=n) for n, r in runs.items()]
    slowdowns = {n: slowdown(r, room.gpus) for n, r in {given.name: run, **runs}.items()}
    fitting = [plan for plan in plans if room.holds(plan)]
    # of those that cost the same, the one that leaves most room, and that splits most
    order = [plan.name for plan in plans]
    best = min(fitting, key=lambda p: (round(slowdowns[p.name], 4), p.gpu, -order.index(p.name)), default=None)
    recommended = best.name if best else given.name if room.holds(given) else None
    if recommended is not None:
        return Advice(plans=(given, *plans), slowdowns=slowdowns, recommended=recommended)
    levers, plan = first_that_fits(run, room)
    return Advice(plans=(given, *plans), slowdowns=slowdowns, recommended=None, levers=levers, with_levers=plan)


def with_zero(run: Run, name: str) -> Run | None:
    """`run` under the ZeRO configuration of this name, all else as it is; None where that makes no sense."""
    zero = zero_section(name)["zero_optimization"]
    changed = replace(run, deepspeed={**run.deepspeed, "zero_optimization": zero})
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if offloaded and "8bit" in str((run.deepspeed.get("optimizer") or {}).get("type", "")):
        return None  # a kernel for GPUs
    if zero.get("stage") == 3 and (run.model.block_swap or run.model.train.quantization != "none"):
        return None  # who is to move and to pack the weights
    return changed


def slowdown(run: Run, gpus: int) -> float:
    """How many times as long as without ZeRO and offload an optimizer step of the costliest bucket takes.

    A rule of thumb, see `RULE`: nothing that is moved is taken to overlap with computing.
    """
    transformer, counts = run.model.transformer, count(run)
    options = read_options(run.deepspeed, transformer.num_attention_heads * transformer.attention_head_dim)
    width = transformer.num_attention_heads * transformer.attention_head_dim
    length, samples = max(
        ((tokens(b, run.shape), n) for b, n in run.batches.items()), key=lambda s: s[1] * s[0] ** 2
    )
    everything = sum(p.numel for p in counts.network)
    training = sum(map(sum, counts.groups))
    forward = samples * length * (2 * everything + 4 * transformer.num_layers * length * width)
    passes = 1 + (1 if run.lora else 2) + (run.checkpointing is not None)
    computing = run.accumulation * passes * forward / COMPUTE
    sent = 2 * training * run.itemsize / LINK * (gpus > 1)
    extra = 0.0
    if options.stage == 3 and gpus > 1:  # gathered for the forward and the backward pass; gradients are sent once
        extra += run.accumulation * 2 * everything * run.itemsize / LINK - sent / 2
    if options.offload_param != "none":
        rate = DISK if options.offload_param == "nvme" else LINK
        extra += run.accumulation * 2 * everything * run.itemsize / gpus / rate
    if options.offload_optimizer != "none":
        extra += (2 * run.itemsize / LINK + CPU_ADAM) * training / gpus
    if options.offload_optimizer == "nvme":  # three fp32 states, read and written
        extra += 2 * 12 * training / gpus / DISK
    return 1 + extra / (computing + sent)


def first_that_fits(run: Run, room: Room) -> tuple[tuple[str, ...], Plan | None]:
    """The first levers, in the order of what they cost, with which a ZeRO configuration fits; none too many."""
    pulled: list[Lever] = []
    for lever in levers(run):
        pulled.append(lever)
        if _best(run, pulled, room) is not None:
            break
    else:
        return (), None
    # the dearest first: is it needed? Again after each that was not, as some rule a configuration out
    while spare := [
        p for p in reversed(pulled) if _best(run, [q for q in pulled if q is not p], room) is not None
    ]:
        pulled.remove(spare[0])
    return tuple(lever.yaml for lever in pulled), _best(run, pulled, room)


def _best(run: Run, pulled: Sequence[Lever], room: Room) -> Plan | None:
    """The least slow ZeRO configuration that fits with these levers."""
    for lever in pulled:
        run = lever.pull(run) or run
    runs = {n: changed for n in ZERO_NAMES if (changed := with_zero(run, n)) is not None}
    for name in sorted(runs, key=lambda n: slowdown(runs[n], room.gpus)):
        plan = make_plan(runs[name], gpus=room.gpus, per_node=room.per_node, name=name)
        if room.holds(plan):
            return plan
    return None


def levers(run: Run) -> list[Lever]:
    """Those that can still be pulled, the cheapest in time first."""
    blocks = run.model.transformer.num_layers
    if run.model.pretrained == PRETRAINED:
        known = [
            Lever(yaml="configs/cogvideo/joint.yaml (ChunkedFirstStage)", pull=_chunks),
            Lever(
                yaml="model.network_config.params.transformer_args.checkpoint_activations: true",
                pull=_checkpointing,
            ),
            Lever(yaml="configs/cogvideo/cached.yaml, with what sat-ext cache made", pull=_from_cache),
            Lever(yaml="configs/cogvideo/offload-text.yaml", pull=_text_on_cpu),
        ]
        return [lever for lever in known if lever.pull(run) is not None]
    known = [
        Lever(yaml="model.first_stage.slicing: true", pull=_first_stage(slicing=True)),
        Lever(yaml="model.sampling.number: 0", pull=_no_samples),
        Lever(yaml="model.first_stage.tiling: true", pull=_first_stage(tiling=True)),
        Lever(yaml="model.gradient_checkpointing: true", pull=_checkpointing),
        Lever(yaml="model.first_stage.frames: 4", pull=_first_stage(frames=4)),
        Lever(yaml="data.params.cache: {folder: ...}  # made once, by sat-ext cache", pull=_from_cache),
        Lever(yaml="model.text.device: cpu  # seconds a caption; a cache costs none", pull=_text_on_cpu),
        Lever(yaml="deepspeed.optimizer.type: bitsandbytes.optim.AdamW8bit", pull=_eight_bit),
        Lever(yaml="model.gradient_checkpointing: {offload: true}", pull=_checkpoints_on_host),
        Lever(yaml="model.train.quantization: nf4", pull=_nf4),
        *(
            Lever(yaml=f"model.block_swap: {n}", pull=_swap(n))
            for n in sorted({blocks // 4, blocks // 2, 3 * blocks // 4, blocks - 2})
            if n > 2
        ),
    ]
    return [lever for lever in known if lever.pull(run) is not None]


def _first_stage(**values: Any) -> Callable[[Run], Run | None]:
    def pull(run: Run) -> Run | None:
        first = run.model.first_stage
        changed = replace(first, **values)
        if run.cached or run.whole_clips or first.kind == "cosine" or changed == first:
            return None
        if first.frames < changed.frames:
            return None
        return replace(run, model=replace(run.model, first_stage=changed))

    return pull


def _chunks(run: Run) -> Run | None:
    if not run.whole_clips or run.cached:
        return None
    first = replace(run.model.first_stage, slicing=True)
    return replace(run, whole_clips=False, model=replace(run.model, first_stage=first))


def _no_samples(run: Run) -> Run | None:
    sampling = run.model.sampling
    if sampling.number == 0:
        return None
    return replace(run, model=replace(run.model, sampling=replace(sampling, number=0)))


def _checkpointing(run: Run) -> Run | None:
    now = run.checkpointing
    if now is not None and now.every == 1:
        return None
    return replace(run, model=replace(run.model, gradient_checkpointing=True))


def _checkpoints_on_host(run: Run) -> Run | None:
    if run.checkpointing is not None and run.checkpointing.offload:
        return None
    return replace(run, model=replace(run.model, gradient_checkpointing=GradientCheckpointing(offload=True)))


def _from_cache(run: Run) -> Run | None:
    if run.cached:
        return None
    sampling = replace(run.model.sampling, number=0)  # there is no decoder
    return replace(run, cached=True, cached_text=True, model=replace(run.model, sampling=sampling))


def _text_on_cpu(run: Run) -> Run | None:
    if run.cached_text or run.model.text.device == "cpu":
        return None
    return replace(run, model=replace(run.model, text=replace(run.model.text, device="cpu")))


def _eight_bit(run: Run) -> Run | None:
    if "8bit" in str((run.deepspeed.get("optimizer") or {}).get("type", "")):
        return None
    optimizer = {"type": "bitsandbytes.optim.AdamW8bit"}
    return replace(run, deepspeed={**run.deepspeed, "optimizer": optimizer})


def _nf4(run: Run) -> Run | None:
    if not run.lora or run.model.train.quantization != "none":
        return None
    return replace(run, model=replace(run.model, train=replace(run.model.train, quantization="nf4")))


def _swap(blocks: int) -> Callable[[Run], Run | None]:
    def pull(run: Run) -> Run | None:
        if not run.lora or run.model.block_swap >= blocks:
            return None
        recompute = run.checkpointing
        if recompute is None or recompute.every > 1:  # which it needs
            recompute = GradientCheckpointing(offload=bool(recompute and recompute.offload))
        return replace(run, model=replace(run.model, block_swap=blocks, gradient_checkpointing=recompute))

    return pull
