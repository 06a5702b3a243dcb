"""Plans as tables for a terminal, and as plain data for a program."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sat_ext.memory.advice import RULE, Advice, Room
from sat_ext.memory.plan import CachePlan, Plan

NVME = " It needs a CUDA toolkit, libaio and a fast disk at nvme_path, and was never run on a GPU."


def gigabytes(number: int) -> str:
    """In units of 1e9 bytes."""
    return f"{number / 1e9:,.1f}"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _title(part: str) -> str:
    return part.removesuffix("_encoder").replace("_", " ")


def configurations(advice: Advice, room: Room) -> Table:
    """A row for each configuration: the parts and the sum of a GPU, and the sum of a host."""
    parts = advice.plans[0].per_gpu
    table = _table("GB of a GPU", *map(_title, parts), "GPU", "host", "fits", "slower")
    for plan in advice.plans:
        numbers = [gigabytes(v) for v in (*plan.per_gpu.values(), plan.gpu, plan.host)]
        chosen = " *" if plan.name == advice.recommended else ""
        lacking = ", ".join(room.lacks(plan))
        fits, style = (f"no: {lacking}", "dim") if lacking else ("yes", None)
        table.add_row(plan.name + chosen, *numbers, fits, f"{plan.slowdown:.2f}x", style=style)
    return table


def of_one(plan: Plan) -> Table:
    """A row for each part of one plan, on a GPU and on a host."""
    table = _table("part", "GPU GB", "host GB")
    for name in {**plan.per_gpu, **plan.per_host}:
        both = plan.per_gpu.get(name, 0), plan.per_host.get(name, 0)
        if any(both):
            table.add_row(_title(name), *(gigabytes(v) if v else "" for v in both))
    table.add_row("in all", gigabytes(plan.gpu), gigabytes(plan.host), style="bold")
    return table


def of_buckets(plan: Plan, measured: Mapping[str, int] | None = None) -> Table:
    """A row for the largest micro-step with each bucket: the peak that PyTorch should allocate, and what was
    measured if given."""
    more = [] if measured is None else ["measured GB", "error"]
    table = _table("bucket", "micro-step", "activations GB", "peak GB", *more)
    for peak in plan.buckets:
        step = " + ".join(f"{n} x {bucket}" for bucket, n in peak.step.items())
        row = [step, gigabytes(peak.activations), gigabytes(peak.peak)]
        if measured is not None:
            found = measured.get(str(peak.bucket))
            row += ["not measured", ""] if found is None else [gigabytes(found), f"{peak.peak / found - 1:+.1%}"]
        table.add_row(str(peak.bucket), *row)
    return table


def of_cache(plan: CachePlan, room: Room) -> Table:
    """A row for making the cache."""
    table = _table("GB of a GPU", "text", "first stage", "GPU", "host", "fits")
    fits = plan.gpu <= room.gpu_memory and plan.host <= room.host_memory
    numbers = [gigabytes(n) for n in (plan.text, plan.first_stage, plan.gpu, plan.host)]
    table.add_row("sat-ext cache", *numbers, "yes" if fits else "no")
    for lever in plan.levers:
        table.add_row(f"  with {lever}")
    return table


def sentences(advice: Advice, room: Room) -> list[str]:
    """What to do, and where the numbers come from."""
    name, plan = advice.recommended, advice.with_levers
    if name is not None:
        slower = next(p.slowdown for p in advice.plans if p.name == name)
        use = "the configuration as given" if name == "given" else f"configs/zero/{name}.yaml"
        cost = f", about {slower:.2f} times as long a step as without" if slower > 1.005 else ""
        return [f"Use {use}{cost}.{NVME if name == 'zero3-nvme' else ''}", RULE]
    lines = [f"Nothing fits {gigabytes(room.gpu_memory)} GB a GPU and {gigabytes(room.host_memory)} GB a host."]
    if plan is not None:
        needs = NVME if plan.name == "zero3-nvme" else ""
        lines.append(f"configs/zero/{plan.name}.yaml fits ({gigabytes(plan.gpu)} GB a GPU) with:{needs}")
        return [*lines, *(f"  {lever}" for lever in advice.levers), RULE]
    least = min(advice.plans, key=lambda p: (p.gpu, p.host))
    part, most = max(least.per_gpu.items(), key=lambda item: item[1])
    lines.append(
        "No lever is enough: use fewer frames, a smaller size or more GPUs. The least is "
        f"{least.name} with {gigabytes(least.gpu)} GB a GPU, {gigabytes(most)} GB of it {_title(part)}."
    )
    return [*lines, RULE]


def as_data(advice: Advice, cache: CachePlan, room: Room) -> dict[str, Any]:
    """Everything, in bytes."""
    return {
        "cache": {**asdict(cache), "gpu": cache.gpu},
        "configs": [_plan_data(plan, room) for plan in advice.plans],
        "recommended": advice.recommended,
        "levers": list(advice.levers),
        "with_levers": advice.with_levers and _plan_data(advice.with_levers, room),
        "gpu_memory": room.gpu_memory,
        "host_memory": room.host_memory,
    }


def _plan_data(plan: Plan, room: Room) -> dict[str, Any]:
    sums = {"gpu": plan.gpu, "host": plan.host, "fits": room.holds(plan), "slowdown": round(plan.slowdown, 3)}
    buckets = [
        {"bucket": str(b.bucket), "step": {str(of): n for of, n in b.step.items()},
         "activations": b.activations, "peak": b.peak}
        for b in plan.buckets
    ]  # fmt: skip
    return {**vars(plan), **sums, "buckets": buckets}
