"""Lines over the steps of a run, as numbers that the page's template draws: everything in percent of the chart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 300  # of a line; more are averaged
_OUTLIERS = 0.02  # of the values at the top, which may leave the chart

Series = Mapping[int, float]  # by step


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """`points` are (x, y) in percent, from the left and from the top; `marked`: each value is shown as a dot."""

    name: str
    color: int
    points: Sequence[tuple[float, float]]
    marked: bool
    last: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LineChart:
    """`ticks` are texts at a percentage of the width, `levels` at one of the height."""

    title: str
    about: str
    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str]]
    levels: Sequence[tuple[float, str]]


def line_chart(
    title: str, about: str, series: Mapping[str, tuple[int, Series]], *, marked: Sequence[str] = (),
    log: bool = False,
) -> LineChart | None:  # fmt: skip
    """A chart of named series, each with the number of its color; None if none has a value.

    The highest 2 % of the values may lie above the chart, where they would press the others flat. With `log` the
    scale is logarithmic."""
    kept = {
        name: (color, {s: v for s, v in of.items() if math.isfinite(v) and (v > 0 or not log)})
        for name, (color, of) in series.items()
    }
    values = np.array([v for _, of in kept.values() for v in of.values()])
    if not len(values):
        return None
    steps = [s for _, of in kept.values() for s in of]
    left, right = min(steps), max(max(steps), min(steps) + 1)
    low, high = float(values.min()), float(np.quantile(values, 1 - _OUTLIERS))
    bottom, top = map(math.log10, (low, high)) if log else (low, high)
    room = max(0.06 * (top - bottom), 1e-3 * max(abs(top), 1e-3))  # wider than nothing
    bottom, top = bottom - room if log or low < 0 else max(0.0, bottom - room), top + room

    def place(step: float, value: float) -> tuple[float, float]:
        height = ((math.log10(value) if log else value) - bottom) / (top - bottom)
        return 100 * (step - left) / (right - left), 100 * (1 - min(1.0, height))

    lines = [
        Line(
            name=name, color=color, points=[place(*point) for point in _fewer(of)], marked=name in marked,
            last=list(of.values())[-1],
        )
        for name, (color, of) in kept.items() if of
    ]  # fmt: skip
    levels = [bottom + (top - bottom) * k / 4 for k in range(5)]
    return LineChart(
        title=title,
        about=about,
        lines=lines,
        ticks=[(100 * k / 4, f"{left + (right - left) * k / 4:,.0f}") for k in range(5)],
        levels=[(100 * (1 - k / 4), f"{10**at if log else at:.3g}") for k, at in enumerate(levels)],
    )


def _fewer(of: Series) -> list[tuple[float, float]]:
    """The points of a series, where they are many the means of neighbours."""
    points = np.array(sorted(of.items()), dtype=float)
    parts = np.array_split(points, min(len(points), MOST_POINTS))
    return [(float(p[:, 0].mean()), float(p[:, 1].mean())) for p in parts]
