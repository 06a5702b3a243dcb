"""Histograms of the preview page, as numbers that its template draws: everything in percent of the chart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 24  # as many bars as a phone shows apart
_TICKS_APART = 13.0  # percent: a label at a phone's width

# Width / height of what cameras, phones and cinemas make.
_SHAPES = ((9 / 16, "9:16"), (3 / 4, "3:4"), (1.0, "1:1"), (4 / 3, "4:3"), (16 / 9, "16:9"), (2.39, "2.39:1"))
_SHORT_SIDES = (64, 128, 240, 480, 720, 1080, 2160, 4320)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One bin: from `x`, `width` wide; its `parts` are (category, top, height, count), from below."""

    x: float
    width: float
    label: str
    parts: tuple[tuple[str, float, float, int], ...]

    def of(self, category: str) -> int:
        """Records of one category in the bin."""
        return sum(n for name, _, _, n in self.parts if name == category)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A stacked histogram. `marks` are vertical lines (the buckets'), `ticks` labels below, as (x, text)."""

    title: str
    about: str
    bars: tuple[Bar, ...]
    marks: tuple[tuple[float, str], ...]
    ticks: tuple[tuple[float, str], ...]
    categories: tuple[str, ...]

    @property
    def labels(self) -> tuple[tuple[float, str], ...]:
        """The marks' texts, as far as they find room beside each other."""
        return _spread(self.marks)

    def has(self, category: str) -> bool:
        """Whether any record is of it."""
        return any(bar.of(category) for bar in self.bars)

    @property
    def highest(self) -> int:
        """Records of the tallest bar."""
        return max(sum(n for _, _, _, n in bar.parts) for bar in self.bars)

    @property
    def total(self) -> int:
        """All records."""
        return sum(n for bar in self.bars for _, _, _, n in bar.parts)


def length_chart(
    title: str, about: str, seconds: Mapping[str, np.ndarray], marks: Sequence[tuple[float, str]]
) -> Chart:
    """Of clips' lengths in seconds, by category. The longest 2 % share the last bar, so that they do not
    squeeze the others."""
    values = np.concatenate(list(seconds.values()))
    reach = max(float(np.quantile(values, 0.98)), max((x for x, _ in marks), default=0.0), 1e-3)
    step = _round_step(reach / BINS)
    bins = min(BINS, max(4, math.ceil(reach * 1.0001 / step)))
    end = bins * step
    beyond = bool((values > end).any())
    edges = np.append(np.arange(bins) * step, np.inf if beyond else end)

    def label(i: int) -> str:
        if i == bins - 1 and beyond:
            return f"{i * step:g} s and longer"
        return f"{i * step:g} to {(i + 1) * step:g} s"

    every = _round_step(end / 6)
    ticks = [(100 * t / end, f"{t:g} s") for t in np.arange(0, end + every / 2, every) if t <= end]
    return Chart(
        title=title,
        about=about,
        bars=_bars(seconds, edges, label),
        marks=tuple((100 * x / end, text) for x, text in marks if x <= end),
        ticks=_spread(ticks),
        categories=tuple(seconds),
    )


def shape_chart(
    title: str, about: str, ratios: Mapping[str, np.ndarray], marks: Sequence[tuple[float, str]]
) -> Chart:
    """Of width / height, by category, on a logarithmic scale: upright on the left, lying on the right."""
    return _log_chart(title, about, ratios, marks, _SHAPES, low=0.5, high=2.0, name=_shape_name)


def size_chart(
    title: str, about: str, sides: Mapping[str, np.ndarray], marks: Sequence[tuple[float, str]]
) -> Chart:
    """Of the shorter side in pixels, by category, on a logarithmic scale."""
    ticks = [(float(s), f"{s}") for s in _SHORT_SIDES]
    return _log_chart(title, about, sides, marks, ticks, low=1.0, high=1.0, name=lambda v: f"{v:.0f}")


def _log_chart(
    title: str,
    about: str,
    values: Mapping[str, np.ndarray],
    marks: Sequence[tuple[float, str]],
    ticks: Sequence[tuple[float, str]],
    *,
    low: float,
    high: float,
    name: object,
) -> Chart:
    """`low` and `high` are shown at least, and all values and marks with them."""
    assert callable(name)
    every = np.concatenate([*values.values(), np.array([x for x, _ in marks])])
    if low == high:
        low, high = float(every.min()), float(every.max())
    bottom = math.log(min(low, float(every.min()))) - 0.15
    top = math.log(max(high, float(every.max()))) + 0.15
    edges = np.exp(np.linspace(bottom, top, BINS + 1))

    def place(value: float) -> float:
        return 100 * (math.log(value) - bottom) / (top - bottom)

    return Chart(
        title=title,
        about=about,
        bars=_bars(values, edges, lambda i: f"{name(edges[i])} to {name(edges[i + 1])}"),
        marks=tuple((place(x), text) for x, text in marks),
        ticks=_spread([(place(x), text) for x, text in ticks if bottom < math.log(x) < top]),
        categories=tuple(values),
    )


def _bars(values: Mapping[str, np.ndarray], edges: np.ndarray, label: object) -> tuple[Bar, ...]:
    assert callable(label)
    counts = {name: np.histogram(v, edges)[0] for name, v in values.items()}
    highest = _highest(values, edges)
    width = 100 / (len(edges) - 1)
    bars = []
    for i in range(len(edges) - 1):
        parts, base = [], 0
        for name, count in counts.items():
            n = int(count[i])
            if n:
                parts.append((name, 100 * (1 - (base + n) / highest), 100 * n / highest, n))
                base += n
        bars.append(Bar(x=i * width, width=width, label=label(i), parts=tuple(parts)))
    return tuple(bars)


def _highest(values: Mapping[str, np.ndarray], edges: np.ndarray) -> int:
    return max(1, int(np.sum([np.histogram(v, edges)[0] for v in values.values()], axis=0).max()))


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `least`.

    >>> [_round_step(v) for v in (0.3, 1.0, 2.1, 60)]
    [0.5, 1.0, 2.5, 100.0]
    """
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1.0, 2.0, 2.5, 5.0, 10.0) if f * power >= least * (1 - 1e-9))


def _spread(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    """Those of the rising ticks whose labels do not touch on a phone."""
    kept: list[tuple[float, str]] = []
    for x, text in ticks:
        if not kept or x - kept[-1][0] >= _TICKS_APART:
            kept.append((x, text))
    return tuple(kept)


def _shape_name(ratio: float) -> str:
    return f"{ratio:.2f}"
