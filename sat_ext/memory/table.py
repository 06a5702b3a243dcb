"""Plans as tables for a terminal, and as plain data for a program."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sat_ext.memory.advice import RULE, Advice, Room
from sat_ext.memory.cache import CachePlan
from sat_ext.memory.plan import Plan

SHORT = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations",
    "first_stage": "first stage", "text_encoder": "text", "buffers": "buffers", "overhead": "allowance",
    "pinned": "pinned", "block_swap": "block swap", "checkpoints": "checkpoints", "data_workers": "data workers",
    "processes": "processes", "loading": "loading",
}  # fmt: skip


NVME = " It needs a CUDA toolkit, libaio and a fast disk at nvme_path, and was never run on a GPU."


def gigabytes(number: int) -> str:
    """In units of 1e9 bytes."""
    return f"{number / 1e9:,.1f}"


def configurations(advice: Advice, room: Room) -> Table:
    """A row for each configuration: bytes by part of a GPU, and in all of a GPU and of a host."""
    parts = list(advice.plans[0].per_gpu)
    table = Table("GB of a GPU", box=None)
    for title in (*(SHORT[p] for p in parts), "GPU", "host", "fits", "slower"):
        table.add_column(title, justify="right")
    for plan in advice.plans:
        numbers = [gigabytes(v) for v in (*plan.per_gpu.values(), plan.gpu, plan.host)]
        chosen = " *" if plan.name == advice.recommended else ""
        style = None if room.holds(plan) else "dim"
        fits = "yes" if room.holds(plan) else f"no: {', '.join(room.lacks(plan))}"
        table.add_row(plan.name + chosen, *numbers, fits, f"{advice.slowdowns[plan.name]:.2f}x", style=style)
    return table


def of_one(plan: Plan) -> Table:
    """A row for each part of one plan: of a GPU, and of a host."""
    table = Table("part", box=None)
    table.add_column("GPU GB", justify="right")
    table.add_column("host GB", justify="right")
    for name in [*plan.per_gpu, *(n for n in plan.per_host if n not in plan.per_gpu)]:
        both = plan.per_gpu.get(name, 0), plan.per_host.get(name, 0)
        if any(both):
            table.add_row(SHORT[name], *(gigabytes(v) if v else "" for v in both))
    table.add_row("in all", gigabytes(plan.gpu), gigabytes(plan.host), style="bold")
    return table


def of_buckets(plan: Plan, measured: Mapping[str, int] | None = None) -> Table:
    """A row for each bucket: what PyTorch is to allocate at its peak, and what it did where that is known."""
    table = Table("bucket", box=None)
    titles = ["samples", "activations GB", "peak GB", *(["measured GB", "error"] if measured is not None else [])]
    for title in titles:
        table.add_column(title, justify="right")
    for peak in plan.buckets:
        row = [str(peak.samples), gigabytes(peak.activations), gigabytes(peak.peak)]
        if measured is not None:
            found = measured.get(str(peak.bucket))
            row += ["not measured", ""] if found is None else [gigabytes(found), f"{peak.peak / found - 1:+.1%}"]
        table.add_row(str(peak.bucket), *row)
    return table


def of_cache(plan: CachePlan, room: Room) -> Table:
    """A row for making the cache."""
    table = Table("GB of a GPU", box=None)
    for title in ("text", "first stage", "GPU", "host", "fits"):
        table.add_column(title, justify="right")
    fits = plan.gpu <= room.gpu_memory and plan.host <= room.host_memory
    numbers = [gigabytes(n) for n in (plan.text, plan.first_stage, plan.gpu, plan.host)]
    table.add_row("sat-ext cache", *numbers, "yes" if fits else "no")
    for lever in plan.levers:
        table.add_row(f"  with {lever}")
    return table


def sentences(advice: Advice, room: Room) -> list[str]:
    """What to do, and where the numbers come from."""
    if advice.recommended is not None:
        name, slower = advice.recommended, advice.slowdowns[advice.recommended]
        use = "the configuration as given" if name == "given" else f"configs/zero/{name}.yaml"
        cost = f", about {slower:.2f} times as long a step as without" if slower > 1.005 else ""
        return [f"Use {use}{cost}.{NVME if name == 'zero3-nvme' else ''}", RULE]
    lines = [f"Nothing fits {gigabytes(room.gpu_memory)} GB a GPU and {gigabytes(room.host_memory)} GB a host."]
    if advice.with_levers is None:
        least = min(advice.plans, key=lambda p: (p.gpu, p.host))
        largest = max(least.per_gpu, key=lambda part: least.per_gpu[part])
        lines.append(
            f"No lever is enough: fewer frames, a smaller size or more GPUs are; the least is {least.name} with "
            f"{gigabytes(least.gpu)} GB a GPU, {gigabytes(least.per_gpu[largest])} GB of it {SHORT[largest]}."
        )
    else:
        plan = advice.with_levers
        needs = NVME if plan.name == "zero3-nvme" else ""
        lines.append(f"configs/zero/{plan.name}.yaml fits ({gigabytes(plan.gpu)} GB a GPU) with:{needs}")
        lines += [f"  {lever}" for lever in advice.levers]
    return [*lines, RULE]


def as_data(advice: Advice, cache: CachePlan, room: Room) -> dict[str, Any]:
    """All of it, in bytes."""
    return {
        "cache": {**asdict(cache), "gpu": cache.gpu},
        "configs": [_plan_data(plan, advice.slowdowns, room) for plan in advice.plans],
        "recommended": advice.recommended,
        "levers": list(advice.levers),
        "with_levers": None if advice.with_levers is None else _plan_data(advice.with_levers, {}, room),
        "gpu_memory": room.gpu_memory,
        "host_memory": room.host_memory,
    }


def _plan_data(plan: Plan, slowdowns: Mapping[str, float], room: Room) -> dict[str, Any]:
    buckets: Sequence[dict[str, Any]] = [
        {"bucket": str(b.bucket), "samples": b.samples, "activations": b.activations, "peak": b.peak}
        for b in plan.buckets
    ]
    found = {
        "name": plan.name, "per_gpu": dict(plan.per_gpu), "per_host": dict(plan.per_host), "gpu": plan.gpu,
        "host": plan.host, "fits": room.holds(plan), "buckets": buckets,
    }  # fmt: skip
    return {**found, "slowdown": round(slowdowns[plan.name], 3)} if plan.name in slowdowns else found
