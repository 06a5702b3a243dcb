"""How every benchmark shows its figures: one table on the terminal and, where asked, the same as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = ("numpy", "torch", "av", "decord", "torchcodec", "Pillow", "pyarrow")


def report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    json_path: str | Path | None = None,
    **facts: Any,
) -> None:
    """Print `rows` under `columns`, and the machine that they were measured on; save all of it to `json_path`.

    Numbers are lined up at the right; True and False show as "met" and "missed". `facts` (the command's options,
    raw figures) go into the JSON beside the rows.
    """
    of = machine()
    table = Table(
        title=escape(title), box=box.SIMPLE_HEAD, show_edge=False, title_justify="left", title_style="bold"
    )
    for i, column in enumerate(columns):
        numbers = all(isinstance(row[i], (int, float)) and not isinstance(row[i], bool) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(value) for value in row))
    # Off a terminal (a log, a pipe) lines are as long as they need to be.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    packages = ", ".join(f"{name} {number}" for name, number in of["packages"].items())
    console.print(f"{of['processor']}, {of['cores']} cores, Python {of['python']}; {packages}", highlight=False)
    if json_path is not None:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        named = [dict(zip(columns, row, strict=True)) for row in rows]
        text = json.dumps({"title": title, "machine": of, **facts, "rows": named}, indent=1, default=str)
        Path(json_path).write_text(text + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, system, and the versions that decide speed."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "[green]met[/]" if value else "[red bold]missed[/]"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))
