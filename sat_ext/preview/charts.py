"""Histograms of the preview page, as numbers that its template draws: everything in percent of the chart."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sat_ext.preview.uses import Uses
from sat_ext.types import Bucket

HEAVY_CUT = 0.25  # of the area: a 16:9 clip in a square loses 44 %, in 3:2 16 %
BINS = 24  # bars that can still be told apart on a phone
_TICKS_APART = 13.0  # percent: a label at a phone's width

# Width / height of what cameras, phones and cinemas make.
_SHAPES = ((9 / 16, "9:16"), (3 / 4, "3:4"), (1.0, "1:1"), (4 / 3, "4:3"), (16 / 9, "16:9"), (2.39, "2.39:1"))
_SHORT_SIDES = (64, 128, 240, 480, 720, 1080, 2160, 4320)

Values = Mapping[str, np.ndarray]  # by category, which are stacked
Labels = Sequence[tuple[float, str]]  # rising places with their texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A stacked histogram. `labels` name the bars; `counts` are, by category, the records in each bar, and `tops`
    where the category's part of the bar begins; the tallest bar has `highest` records. `marks` are vertical lines
    (the buckets'), of which `mark_labels` are printed, and `ticks` labels below."""

    title: str
    about: str
    labels: Sequence[str]
    counts: Mapping[str, Sequence[int]]
    tops: Mapping[str, Sequence[float]]
    highest: int
    marks: Labels
    mark_labels: Labels
    ticks: Labels


def charts_of(uses: Uses, buckets: Sequence[Bucket], fps: int) -> list[Chart]:
    """How long the clips are, and the shapes and sizes of all files, beside those of the buckets."""
    part, gone = uses.part, uses.left_out
    found = []
    if (part["seconds"] > 0).any() or (gone["seconds"] > 0).any():
        as_still = (part["seconds"] > 0) & ~uses.moving
        seconds = {
            "trained on as clips": part["seconds"][uses.moving],
            "one frame is used": part["seconds"][as_still],
            "left out": gone["seconds"][gone["seconds"] > 0],
        }
        marks = [(f / fps, f"{f}") for f in sorted({b.frames for b in buckets if b.frames > 1})]
        about = "Seconds of each clip. The lines are the buckets' lengths."
        found.append(length_chart("Length of clips", about, seconds, marks))
    ratio, is_cut = part["width"] / part["height"], uses.cut > HEAVY_CUT
    ratios = {
        "used": ratio[~is_cut],
        f"cut by more than {100 * HEAVY_CUT:.0f} %": ratio[is_cut],
        "left out": gone["width"] / gone["height"],
    }
    marks = sorted({(b.width / b.height, f"{b.width}×{b.height}") for b in buckets})
    about = "Width / height: upright on the left, lying on the right. The lines are the buckets' shapes."
    found.append(log_chart("Shape", about, ratios, marks, _SHAPES, form=".2f", shown=(0.5, 2.0)))
    side, is_small = np.minimum(part["width"], part["height"]), uses.enlarged > 1
    sides = {
        "shrunk or as it is": side[~is_small],
        "enlarged": side[is_small],
        "left out": np.minimum(gone["width"], gone["height"]),
    }
    marks = sorted({(min(b.height, b.width), f"{min(b.height, b.width)}") for b in buckets})
    about = "The shorter side in pixels. The lines are the buckets' shorter sides."
    found.append(log_chart("Size", about, sides, marks, [(s, f"{s}") for s in _SHORT_SIDES], form=".0f"))
    return found


def length_chart(title: str, about: str, seconds: Values, marks: Labels) -> Chart:
    """Lengths in seconds. The longest 2 % share the last bar, so that they do not squeeze the others."""
    values = np.concatenate(list(seconds.values()))
    reach = max([float(np.quantile(values, 0.98)), 1e-3, *(x for x, _ in marks)])
    step = _round_step(reach / BINS)
    edges = np.arange(min(BINS, max(4, math.ceil(reach * 1.0001 / step))) + 1) * step
    end = edges[-1]
    labels = [f"{a:g} to {b:g} s" for a, b in pairwise(edges)]
    if (values > end).any():
        edges[-1] = np.inf
        labels[-1] = f"{edges[-2]:g} s and longer"
    tick = _round_step(end / 6)
    ticks = [(t, f"{t:g} s") for t in np.arange(0, end + tick / 2, tick)]
    return _chart(title, about, seconds, edges, labels, marks, ticks, lambda x: 100 * x / end)


def log_chart(
    title: str, about: str, values: Values, marks: Labels, ticks: Labels, *, form: str, shown: Sequence[float] = ()
) -> Chart:
    """On a logarithmic scale, which holds all values and marks, and `shown`."""
    every = np.log(np.concatenate([*values.values(), [x for x, _ in marks], shown]))
    bottom, top = every.min() - 0.15, every.max() + 0.15
    edges = np.exp(np.linspace(bottom, top, BINS + 1))
    labels = [f"{a:{form}} to {b:{form}}" for a, b in pairwise(edges)]

    def place(value: float) -> float:
        return 100 * (math.log(value) - bottom) / (top - bottom)

    return _chart(title, about, values, edges, labels, marks, ticks, place)


def _chart(
    title: str, about: str, values: Values, edges: np.ndarray, labels: Sequence[str], marks: Labels, ticks: Labels,
    place: Callable[[float], float],
) -> Chart:  # fmt: skip
    counts = np.array([np.histogram(v, edges)[0] for v in values.values()])
    highest = max(1, int(counts.sum(axis=0).max()))
    tops = 100 * (1 - counts.cumsum(axis=0) / highest)
    marks, ticks = ([(at, text) for x, text in each if 0 <= (at := place(x)) <= 100] for each in (marks, ticks))
    return Chart(
        title=title, about=about, labels=labels, counts=dict(zip(values, counts.tolist())),
        tops=dict(zip(values, tops.tolist())), highest=highest, marks=marks, mark_labels=_spread(marks),
        ticks=_spread(ticks),
    )  # fmt: skip


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `least`.

    >>> [_round_step(v) for v in (0.3, 1.0, 2.1, 60)]
    [0.5, 1.0, 2.5, 100.0]
    """
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1.0, 2.0, 2.5, 5.0, 10.0) if f * power >= least * (1 - 1e-9))


def _spread(labels: Labels) -> Labels:
    """Those whose texts do not touch on a phone."""
    kept: list[tuple[float, str]] = []
    for x, text in labels:
        if not kept or x - kept[-1][0] >= _TICKS_APART:
            kept.append((x, text))
    return kept
