"""What to know about a data set before training on it, in plain words, the worst first."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.caption_lengths import too_long
from sat_ext.cogvideox import tokens
from sat_ext.data.clips import find_sampler
from sat_ext.data.index import clip_lengths, longest_is_rare
from sat_ext.data.index.lengths import is_too_short
from sat_ext.data.stream import JointStream
from sat_ext.preview.charts import HEAVY_CUT
from sat_ext.preview.report import Finding, SourcePart, count, percent
from sat_ext.preview.uses import Uses
from sat_ext.recipe import Recipe

ENLARGED = 1.25  # sides: below that, blur is hard to see
RARE = 0.02  # of the records: below that, a fault of single files and not of the setting
REPEATED = 5  # visits of a record of one source, for one of another
SAME_CAPTION = 0.05
_LISTED, _MOST_EXAMPLES = 5, 8
_LEVELS = ("problem", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the findings are found in."""

    recipe: Recipe
    stream: JointStream
    uses: Uses
    sources: Sequence[SourcePart]


def find(facts: Facts) -> list[Finding]:
    """All findings, the worst first."""
    return by_level(finding for check in _CHECKS for finding in check(facts))


def by_level(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first."""
    return sorted(findings, key=lambda f: _LEVELS.index(f.level))


def by_reason(gone: Iterable[tuple[str, str]]) -> list[tuple[str, int, list[str]]]:
    """Why files, given with their reasons, were left out, the commonest first: how many, and some of them."""
    found: dict[str, list[str]] = {}
    for path, reason in gone:
        found.setdefault(reason_group(reason), []).append(f"{path}: {reason}")
    return [(r, len(found[r]), found[r][:_MOST_EXAMPLES]) for r in sorted(found, key=lambda r: -len(found[r]))]


def reason_group(reason: str) -> str:
    """A reason without what is particular to one file, so that reasons can be counted.

    >>> reason_group("too short for the shortest bucket (5 of 9 frames)")
    'too short for the shortest bucket'
    """
    return re.sub(r"\s*\([^)]*\)", "", reason.split(":")[0]).strip()


def _unreadable(facts: Facts) -> Iterator[Finding]:
    bad, allowed = facts.stream.index.bad, facts.recipe.data.on_bad_sample.skip
    if bad:
        consequence = "Training leaves them out."
        if len(bad) > allowed:
            consequence = f"Training will not start: data.params.on_bad_sample.skip allows {allowed}."
        yield Finding(
            level="problem",
            text=f"{_files(len(bad))} cannot be read.",
            remedy=f"Fix or remove them; sat-ext check lists them all. {consequence}",
            examples=[f"{path}: {reason}" for path, reason in bad[:_LISTED]],
        )


def _unread(facts: Facts) -> Iterator[Finding]:
    if unread := facts.stream.index.unread:
        endings = ", ".join(f"{number:,} {ending}" for ending, number in unread.items())
        yield Finding(
            level="warning",
            text=f"Left out because their endings are not read: {endings}.",
            remedy="Convert them, stills to JPEG or PNG and clips to MP4, or give them their usual ending.",
        )


def _no_caption(facts: Facts) -> Iterator[Finding]:
    empty = [p for p, captions in _captions(facts) if not any(c.strip() for c in captions)]
    if empty:
        share = len(empty) / len(facts.uses.part)
        yield Finding(
            level="problem" if share > SAME_CAPTION else "warning",
            text=f"{_files(len(empty))} ({percent(share)}) have an empty caption.",
            remedy="The model learns from them only what things look like, not what they are called.",
            examples=empty[:_LISTED],
        )


def _all_still(facts: Facts) -> Iterator[Finding]:
    moving = any(not find_sampler(s.sampler).still for s in facts.sources)
    if moving and len(facts.uses.lengths) and not facts.uses.moving.any():
        yield Finding(
            level="warning",
            text="There are clips, but every sample is a still: the model will not learn movement.",
            remedy="Add lengths above 1 to data.params.buckets.frames.",
        )


def _longest(facts: Facts) -> Iterator[Finding]:
    if rare := longest_is_rare(clip_lengths(facts.stream.index), facts.recipe.data):
        what, remedy = rare
        yield Finding(level="warning", text=f"{what[0].upper()}{what[1:]}.", remedy=f"{remedy.capitalize()}.")


def _short(facts: Facts) -> Iterator[Finding]:
    data, lengths = facts.recipe.data, [b.frames for b in facts.recipe.buckets]
    # Shorter clips are filled up or left out, unless each may take a shorter bucket: then it only has to move.
    needed = (min if data.short_clips == "shorter_bucket" else max)((n for n in lengths if n > 1), default=1)
    short = facts.uses.lengths < needed
    if not short.any():
        return
    fate = {
        "loop": "they are played again from the start to fill it",
        "pad_last": "their last frame is repeated to fill it",
        "shorter_bucket": "they are trained on as stills" if 1 in lengths else "they are left out",
        "drop": "they are left out",
    }[data.short_clips]
    yield Finding(
        level="warning" if short.mean() > RARE else "note",
        text=f"{percent(short.mean())} of your clips ({count(short.sum())}) are shorter than the frame bucket "
        f"that they need ({needed} frames, {(needed - 1) / data.fps:.3g} s at {data.fps} fps): {fate}.",
        remedy="Add a shorter length to data.params.buckets.frames, or choose another data.params.short_clips.",
    )


def _dropped(facts: Facts) -> Iterator[Finding]:
    # `_short` covers those that are too short
    dropped = [(path, reason_group(r)) for path, r in facts.stream.index.dropped if not is_too_short(r)]
    for reason, number in Counter(reason for _, reason in dropped).most_common():
        yield Finding(
            level="warning",
            text=f"{_files(number)} are left out: {reason}.",
            remedy="Change data.params.buckets, or take the files out of the source.",
            examples=[path for path, r in dropped if r == reason][:_LISTED],
        )


def _cut(facts: Facts) -> Iterator[Finding]:
    part, cut = facts.uses.part, facts.uses.cut
    heavy = cut > HEAVY_CUT
    if heavy.any():
        ratio = float(np.median((part["width"] / part["height"])[heavy]))
        kind = "upright" if ratio < 0.9 else "about square" if ratio < 1.1 else "wide"
        yield Finding(
            level="warning" if heavy.mean() > RARE else "note",
            text=f"{percent(heavy.mean())} of the records ({count(heavy.sum())}) lose more than a quarter of the "
            f"picture to the crop; most of them are {kind} (width / height {ratio:.2f}).",
            remedy="Add a size of their shape to data.params.buckets.sizes, or give an area and ratios.",
            examples=_worst(facts, heavy, 100 * cut, "{:.0f} % cut"),
        )


def _enlarged(facts: Facts) -> Iterator[Finding]:
    factor = facts.uses.enlarged
    small = factor > ENLARGED
    if small.any():
        median = float(np.median(factor[small]))
        yield Finding(
            level="warning" if small.mean() > RARE else "note",
            text=f"{percent(small.mean())} of the records ({count(small.sum())}) are smaller than their bucket "
            f"and enlarged, by a median factor of {median:.1f}: the model learns their blur.",
            remedy="Train on a smaller size, or take the smallest files out.",
            examples=_worst(facts, small, factor, "enlarged {:.1f} times"),
        )


def _slow(facts: Facts) -> Iterator[Finding]:
    moving, rate, fps = facts.uses.moving, facts.uses.part["fps"], facts.recipe.data.fps
    slow = moving & (rate > 0) & (rate < fps * 0.99)
    if slow.any():
        yield Finding(
            level="note",
            text=f"{percent(slow.sum() / moving.sum())} of the clips have fewer than {fps} frames a second: "
            "some of their frames are shown twice.",
            remedy="Lower data.params.fps where that is most of them.",
            examples=_worst(facts, slow, rate, "{:.3g} fps"),
        )


def _repeated(facts: Facts) -> Iterator[Finding]:
    # In the steps that this source takes to be seen once, the others come around several times.
    slowest = max(facts.sources, key=lambda s: s.steps)
    for source in facts.sources:
        times = slowest.steps / source.steps
        if times >= REPEATED:
            whole = f" ({count(source.epochs)} times in the whole run)" if source.epochs else ""
            yield Finding(
                level="warning",
                text=f"Each record of '{source.name}' is seen {count(times)} times{whole} while each of "
                f"'{slowest.name}' is seen once.",
                remedy="Lower its share, or add files to it.",
            )


def _same_captions(facts: Facts) -> Iterator[Finding]:
    for source in facts.sources:
        texts = [c for _, captions in _captions(facts, source.name) for c in captions if c.strip()]
        if len(texts) < 20:  # in a handful of files, one pair is already many percent
            continue
        (text, number), *_ = Counter(texts).most_common(1)
        distinct = len(set(texts)) / len(texts)
        if number / len(texts) > SAME_CAPTION or distinct < 0.5:
            yield Finding(
                level="note",
                text=f"'{source.name}': {percent(1 - distinct)} of the captions repeat another; the most frequent "
                f"one belongs to {_files(number)}: “{text[:80]}{'…' if len(text) > 80 else ''}”.",
                remedy="Captions that say what is different about each file teach more.",
            )


def _long_captions(facts: Facts) -> Iterator[Finding]:
    long, limit = too_long(_captions(facts), facts.recipe)
    if long:
        yield Finding(
            level="note",
            text=f"{_files(len(long))} have captions longer than the {limit} that the model reads: the rest is "
            "cut off.",
            remedy="Put what matters first, or shorten them.",
            examples=long[:_LISTED],
        )


def _few(facts: Facts) -> Iterator[Finding]:
    schedule, size = facts.stream.schedule, facts.stream.size
    cells = schedule.cells
    few = [c for c in cells if max(1, c.records // (2 * schedule.world)) < size.most(c.bucket)]
    if few:
        share = sum(c.records for c in few) / sum(c.records for c in cells)
        yield Finding(
            level="warning" if share > HEAVY_CUT else "note",
            text=f"{len(few)} of {len(cells)} pairs of source and bucket ({percent(share)} of the records) have "
            "too few to fill a step without repeats: their steps are smaller, and may use the GPU less.",
            remedy="Use fewer buckets, join sources, or add files.",
            examples=[f"'{c.source}' in {c.bucket}: {count(c.records)}" for c in few],
        )


def _unfilled(facts: Facts) -> Iterator[Finding]:
    # An empty bucket costs something only if it is the largest.
    most = max(tokens(c.bucket) for c in facts.stream.schedule.cells)
    if empty := [b for b in facts.recipe.buckets if tokens(b) > most]:
        which = f"{'the bucket' if len(empty) == 1 else 'these buckets:'} {', '.join(map(str, empty))}"
        yield Finding(
            level="warning",
            text=f"No file falls into {which}, larger than any that is filled: the memory plan, and the batches "
            "under {cost: auto}, are sized for what is never trained on.",
            remedy="Take them out: lower data.params.max_num_frames, or shorten data.params.buckets.",
        )


_CHECKS = (
    _unreadable, _unread, _no_caption, _all_still, _longest, _short, _dropped, _cut, _enlarged, _repeated, _few,
    _unfilled, _slow, _same_captions, _long_captions,
)  # fmt: skip


def _files(number: int) -> str:
    return f"{count(number)} file{'' if number == 1 else 's'}"


def _captions(facts: Facts, source: str | None = None) -> Iterator[tuple[str, Sequence[str]]]:
    """Path and captions of every row of the index, or of one source."""
    table: pa.Table = facts.stream.index.table.select(["source", "path", "captions"])
    if source is not None:
        table = table.filter(pc.equal(pc.cast(table.column("source"), pa.string()), source))
    for batch in table.to_batches():
        yield from zip(batch.column("path").to_pylist(), batch.column("captions").to_pylist())


def _worst(facts: Facts, chosen: np.ndarray, by: np.ndarray, form: str) -> list[str]:
    """The chosen records that have most of something, each file once."""
    rows = np.flatnonzero(chosen)
    order = rows[np.argsort(-by[rows], kind="stable")][: 4 * _LISTED]
    paths = facts.stream.index.table.column("path")
    return list(dict.fromkeys(f"{paths[int(i)].as_py()}: {form.format(by[i])}" for i in order))[:_LISTED]
