"""Which ZeRO configuration to use, what it costs, and which levers to pull if none fits."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sat_ext.cogvideox import tokens
from sat_ext.memory.counts import count
from sat_ext.memory.levers import Lever, cache_levers, levers
from sat_ext.memory.plan import CachePlan, Plan, make_plan, plan_cache
from sat_ext.memory.run import Run
from sat_ext.zero import ZERO, ZERO_NAMES

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
    """`gpus` in all, `per_node` of them in each host, and the bytes of memory of each GPU and each host."""

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
        """Whether there is enough of everything."""
        return not self.lacks(plan)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Plans of the configuration as given, and of each of `configs/zero/`.

    `recommended` is the name of a plan that fits. If none does, `levers` are lines of YAML with which
    `with_levers` fits; it is None if all levers together are not enough."""

    plans: tuple[Plan, ...]
    recommended: str | None
    levers: tuple[str, ...] = ()
    with_levers: Plan | None = None


def advise(run: Run, room: Room) -> Advice:
    """Plan `run` as given and under every ZeRO configuration, and choose."""
    given = _plan(run, room, "given")
    plans = tuple(_zero_plans(run, room))
    best = _best(plans, room) or (given if room.holds(given) else None)
    if best is not None:
        return Advice(plans=(given, *plans), recommended=best.name)
    yaml, plan = first_that_fits(run, room)
    return Advice(plans=(given, *plans), recommended=None, levers=yaml, with_levers=plan)


def first_that_fits(
    run: Run, room: Room, names: Sequence[str] = ZERO_NAMES
) -> tuple[tuple[str, ...], Plan | None]:
    """The cheapest levers with which one of these ZeRO configurations fits, and no more than are needed."""

    def fits(pulled: Sequence[Lever]) -> bool:
        return any(room.holds(plan) for plan in _zero_plans(_with(run, pulled), room, names))

    pulled: list[Lever] = []
    remaining = iter(levers(run))
    while not fits(pulled):
        lever = next(remaining, None)
        if lever is None:
            return (), None
        pulled.append(lever)
    # leave out the most expensive that is not needed; then look again, because some rule out a configuration
    while spare := [p for p in reversed(pulled) if fits([q for q in pulled if q is not p])]:
        pulled.remove(spare[0])
    return tuple(lever.yaml for lever in pulled), _best(_zero_plans(_with(run, pulled), room, names), room)


def cache_that_fits(run: Run, per_node: int, gpu_memory: int) -> CachePlan:
    """How to make the cache of `run`, with the first lever of each encoder that makes it fit, if one does."""
    run = replace(run, cached=False, cached_text=False)
    yaml: list[str] = []
    for part, choices in cache_levers(run).items():
        if getattr(plan_cache(run, per_node), part) <= gpu_memory:
            continue
        for name, pull in choices.items():
            if getattr(plan_cache(pull(run), per_node), part) <= gpu_memory:
                yaml.append(name)
                run = pull(run)
                break
    return replace(plan_cache(run, per_node), levers=tuple(yaml))


def with_zero(run: Run, name: str) -> Run | None:
    """`run` under the ZeRO configuration of this name, otherwise as it is; None if the two do not go together."""
    changed = replace(run, deepspeed={**run.deepspeed, "zero_optimization": ZERO[name]})
    device = changed.options.offload_optimizer.device
    if run.has_eight_bit_optimizer and device != "none" or run.averages_weights and device == "nvme":
        return None
    # ZeRO-3 moves and packs weights itself
    if changed.options.stage == 3 and run.model.without_zero3:
        return None
    return changed


def slowdown(run: Run, gpus: int) -> float:
    """How many times as long as without ZeRO and offload an optimizer step of the costliest bucket takes.

    A rule of thumb, see `RULE`: it takes nothing that is moved to overlap with computing."""
    counts, options = count(run), run.options
    sizes = [(tokens(b, run.shape), step[b]) for b, step in run.steps.items()]
    length, samples = max(sizes, key=lambda size: size[1] * size[0] ** 2)
    everything = sum(p.numel for p in counts.network)
    training = sum(map(sum, counts.groups))
    attention = 4 * run.model.transformer.num_layers * length * run.width
    passes = 1 + (1 if run.lora else 2) + (run.model.checkpointing is not None)
    computing = run.accumulation * passes * samples * length * (2 * everything + attention) / COMPUTE
    sent = 2 * training * run.itemsize / LINK * (gpus > 1)
    extra = 0.0
    if options.stage == 3 and gpus > 1:  # gathered for the forward and the backward pass; gradients are sent once
        extra += run.accumulation * 2 * everything * run.itemsize / LINK - sent / 2
    if options.offload_param.device != "none":
        rate = DISK if options.offload_param.device == "nvme" else LINK
        extra += run.accumulation * 2 * everything * run.itemsize / gpus / rate
    if options.offload_optimizer.device != "none":
        extra += (2 * run.itemsize / LINK + CPU_ADAM) * training / gpus
    if options.offload_optimizer.device == "nvme":  # three fp32 states, read and written
        extra += 2 * 12 * training / gpus / DISK
    return 1 + extra / (computing + sent)


def _plan(run: Run, room: Room, name: str) -> Plan:
    plan = make_plan(run, gpus=room.gpus, per_node=room.per_node, name=name)
    return replace(plan, slowdown=slowdown(run, room.gpus))


def _zero_plans(run: Run, room: Room, names: Sequence[str] = ZERO_NAMES) -> Iterator[Plan]:
    for name in names:
        if (changed := with_zero(run, name)) is not None:
            yield _plan(changed, room, name)


def _best(plans: Iterable[Plan], room: Room) -> Plan | None:
    """The fastest that fits; of equally fast ones the one that leaves most room, then the one that splits most."""
    fitting = [plan for plan in plans if room.holds(plan)]
    return min(fitting, key=lambda p: (round(p.slowdown, 4), p.gpu, -ZERO_NAMES.index(p.name)), default=None)


def _with(run: Run, pulled: Sequence[Lever]) -> Run:
    for lever in pulled:
        run = lever.pull(run)
    return run
