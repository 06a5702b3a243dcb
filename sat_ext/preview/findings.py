"""What one should know of a data set before training on it, in plain words, the worst first."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.cogvideox import tokens
from sat_ext.data.clips import find_sampler
from sat_ext.data.index import Index, clip_lengths, longest_is_rare
from sat_ext.data.params import DataConfig
from sat_ext.data.schedule import Cell
from sat_ext.preview.page import count, percent
from sat_ext.preview.report import Finding, SourcePart
from sat_ext.preview.uses import Uses
from sat_ext.types import Bucket

HEAVY_CUT = 0.25  # of the area: a 16:9 clip in a square loses 44 %, in 3:2 16 %
ENLARGED = 1.25  # sides: below that, blur is hard to see
RARE = 0.02  # of the records: below that, a fault of single files and not of the setting
REPEATED = 5  # visits of a record of one source, for one of another
SAME_CAPTION = 0.05
LETTERS_PER_TOKEN = 4  # English text in T5's vocabulary, about
_LISTED = 5
_LEVELS = ("problem", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the findings are found in. `clips_dropped` counts clips among the files that are left out."""

    data: DataConfig
    index: Index
    uses: Uses
    cells: tuple[Cell, ...]
    batch_sizes: dict[Bucket, int]
    sources: tuple[SourcePart, ...]
    short: int
    clips: int
    text_tokens: int
    bytes_per_token: int


def find(facts: Facts) -> tuple[Finding, ...]:
    """All findings, the worst first."""
    every = [f for check in _CHECKS for f in check(facts)]
    return tuple(sorted(every, key=lambda f: _LEVELS.index(f.level)))


def reason_group(reason: str) -> str:
    """A reason without what is of one file only, so that reasons can be counted.

    >>> reason_group("too short for the shortest bucket (5 of 9 frames)")
    'too short for the shortest bucket'
    """
    return re.sub(r"\s*\([^)]*\)", "", reason.split(":")[0]).strip()


def _unreadable(facts: Facts) -> Iterator[Finding]:
    bad, endured = facts.index.bad, facts.data.on_bad_sample.skip
    if bad:
        consequence = (
            "Training leaves them out."
            if len(bad) <= endured
            else f"Training will not start: data.params.on_bad_sample.skip allows {endured}."
        )
        yield Finding(
            level="problem",
            text=f"{_files(len(bad))} cannot be read.",
            remedy=f"Fix or remove them; sat-ext check lists them all. {consequence}",
            examples=tuple(f"{path}: {reason}" for path, reason in bad[:_LISTED]),
        )


def _unread(facts: Facts) -> Iterator[Finding]:
    if unread := facts.index.unread:
        endings = ", ".join(f"{number:,} {ending}" for ending, number in unread.items())
        yield Finding(
            level="warning",
            text=f"Left out because their endings are not read: {endings}.",
            remedy="Convert them, stills to JPEG or PNG and clips to MP4, or give them their usual ending.",
        )


def _no_caption(facts: Facts) -> Iterator[Finding]:
    empty = [p for p, captions in _captions(facts) if not any(c.strip() for c in captions)]
    if empty:
        share = len(empty) / len(facts.uses)
        yield Finding(
            level="problem" if share > SAME_CAPTION else "warning",
            text=f"{_files(len(empty))} ({percent(share)}) have an empty caption.",
            remedy="The model learns from them only what things look like, not what they are called.",
            examples=tuple(empty[:_LISTED]),
        )


def _short(facts: Facts) -> Iterator[Finding]:
    least, fps = needed_frames(facts.data), facts.data.fps
    if not facts.short or least is None:
        return
    share = facts.short / facts.clips
    fate = {
        "loop": "they are played again from the start to fill it",
        "pad_last": "their last frame is repeated to fill it",
    }.get(facts.data.short_clips)
    if fate is None:
        stills = facts.data.short_clips == "shorter_bucket" and 1 in {b.frames for b in facts.data.make_buckets()}
        fate = "they are trained on as stills" if stills else "they are left out"
    yield Finding(
        level="warning" if share > RARE else "note",
        text=f"{percent(share)} of your clips ({count(facts.short)}) are shorter than the frame bucket that they "
        f"need ({least} frames, {(least - 1) / fps:.3g} s at {fps} fps): {fate}.",
        remedy="Add a shorter length to data.params.buckets.frames, or choose another data.params.short_clips.",
    )


def needed_frames(data: DataConfig) -> int | None:
    """How long a clip must be to be shown moving and as it is: the shortest length above 1; the longest where
    shorter clips are filled up or left out. None where no length is above 1."""
    lengths = {b.frames for b in data.make_buckets() if b.frames > 1}
    return (min if data.short_clips == "shorter_bucket" else max)(lengths, default=None)


def _longest(facts: Facts) -> Iterator[Finding]:
    if rare := longest_is_rare(clip_lengths(facts.index), facts.data):
        what, remedy = rare
        yield Finding(level="warning", text=f"{what[0].upper()}{what[1:]}.", remedy=f"{remedy.capitalize()}.")


def _dropped(facts: Facts) -> Iterator[Finding]:
    groups = Counter(reason_group(reason) for _, reason in facts.index.dropped)
    for reason, number in groups.most_common():
        if reason.startswith("too short"):
            continue  # `_short` covers them
        yield Finding(
            level="warning",
            text=f"{_files(number)} are left out: {reason}.",
            remedy="Change data.params.buckets, or take the files out of the source.",
            examples=tuple(p for p, r in facts.index.dropped if reason_group(r) == reason)[:_LISTED],
        )


def _cut(facts: Facts) -> Iterator[Finding]:
    uses = facts.uses
    heavy = uses.cut > HEAVY_CUT
    if not heavy.any():
        return
    share = float(heavy.mean())
    ratio = float(np.median((uses.width / uses.height)[heavy]))
    kind = "upright" if ratio < 0.9 else "about square" if ratio < 1.1 else "wide"
    yield Finding(
        level="warning" if share > RARE else "note",
        text=f"{percent(share)} of the records ({count(heavy.sum())}) lose more than a quarter of the picture to "
        f"the crop; most of them are {kind} (width / height {ratio:.2f}).",
        remedy="Add a size of their shape to data.params.buckets.sizes, or give an area and ratios.",
        examples=_paths(facts, heavy, uses.cut, lambda v: f"{100 * v:.0f} % cut"),
    )


def _enlarged(facts: Facts) -> Iterator[Finding]:
    uses = facts.uses
    small = uses.enlarged > ENLARGED
    if not small.any():
        return
    share = float(small.mean())
    yield Finding(
        level="warning" if share > RARE else "note",
        text=f"{percent(share)} of the records ({count(small.sum())}) are smaller than their bucket and enlarged, "
        f"by {float(np.median(uses.enlarged[small])):.1f} times in the middle: the model learns their blur.",
        remedy="Train on a smaller size, or take the smallest files out.",
        examples=_paths(facts, small, uses.enlarged, lambda v: f"enlarged {v:.1f} times"),
    )


def _slow(facts: Facts) -> Iterator[Finding]:
    uses, fps = facts.uses, facts.data.fps
    slow = uses.moving & (uses.fps > 0) & (uses.fps < fps * 0.99)
    if slow.any():
        yield Finding(
            level="note",
            text=f"{percent(slow.sum() / uses.moving.sum())} of the clips have fewer than {fps} frames a second: "
            "some of their frames are shown twice.",
            remedy="Lower data.params.fps where that is most of them.",
            examples=_paths(facts, slow, uses.fps, lambda v: f"{v:.3g} fps"),
        )


def _repeated(facts: Facts) -> Iterator[Finding]:
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
    for name in facts.uses.sources:
        texts = [c for _, captions in _captions(facts, name) for c in captions if c.strip()]
        if len(texts) < 20:
            continue
        (text, number), *_ = Counter(texts).most_common(1)
        distinct = len(set(texts)) / len(texts)
        if number / len(texts) > SAME_CAPTION or distinct < 0.5:
            yield Finding(
                level="note",
                text=f"'{name}': {percent(1 - distinct)} of the captions repeat another; the most frequent one "
                f"stands at {_files(number)}: “{text[:80]}{'…' if len(text) > 80 else ''}”.",
                remedy="Captions that say what is different about each file teach more.",
            )


def _long_captions(facts: Facts) -> Iterator[Finding]:
    most = facts.text_tokens * facts.bytes_per_token
    long = [p for p, captions in _captions(facts) if any(len(c.encode(errors="replace")) > most for c in captions)]
    if long:
        about = "" if facts.bytes_per_token == 1 else "about "
        yield Finding(
            level="note",
            text=f"{_files(len(long))} have captions longer than the {facts.text_tokens} tokens "
            f"({about}{count(most)} letters) that the model reads: the rest is cut off.",
            remedy="Put what matters first, or shorten them.",
            examples=tuple(long[:_LISTED]),
        )


def _few(facts: Facts) -> Iterator[Finding]:
    few = [c for c in facts.cells if c.batch < facts.batch_sizes[c.bucket]]
    if few:
        share = sum(c.records for c in few) / sum(c.records for c in facts.cells)
        yield Finding(
            level="warning" if share > HEAVY_CUT else "note",
            text=f"Too few records for full batches: {len(few)} of {len(facts.cells)} pairs of source and bucket "
            f"({percent(share)} of the records) take smaller ones, and their steps use the GPU less.",
            remedy="Fewer buckets, sources joined into one, or more files fill them.",
            examples=tuple(
                f"'{c.source}' in {c.bucket}: {count(c.records)} records, batches of {c.batch} instead of "
                f"{facts.batch_sizes[c.bucket]}"
                for c in few
            ),
        )
    used = {c.bucket for c in facts.cells}
    most = max(map(tokens, used))
    empty = [b for b in facts.data.make_buckets() if b not in used]
    costly = [b for b in empty if tokens(b) > most]
    if costly:
        yield Finding(
            level="warning",
            text=f"No file falls into {_buckets(costly)}, larger than any that is filled: the plan of memory, "
            "and the batches under {cost: auto}, are sized for what is never trained on.",
            remedy="Take them out: lower data.params.max_num_frames, or shorten data.params.buckets.",
        )
    if idle := [b for b in empty if b not in costly]:
        yield Finding(
            level="note",
            text=f"No file falls into {_buckets(idle)}.",
            remedy="These cost nothing; take them out of data.params.buckets to say what you mean.",
        )


def _all_still(facts: Facts) -> Iterator[Finding]:
    meant = all(find_sampler(s.sampler).still for s in facts.sources)
    if not facts.uses.moving.any() and not meant and facts.clips:
        yield Finding(
            level="warning",
            text="There are clips, but every sample is a still: the model will not learn movement.",
            remedy="Add lengths above 1 to data.params.buckets.frames.",
        )


_CHECKS = (
    _unreadable, _unread, _no_caption, _all_still, _longest, _short, _dropped, _cut, _enlarged, _repeated, _few,
    _slow, _same_captions, _long_captions,
)  # fmt: skip


def _buckets(buckets: Sequence[Bucket]) -> str:
    return f"{'the bucket' if len(buckets) == 1 else 'these buckets:'} {', '.join(map(str, buckets))}"


def _files(number: int) -> str:
    return f"{count(number)} file{'' if number == 1 else 's'}"


def _captions(facts: Facts, source: str | None = None) -> Iterator[tuple[str, Sequence[str]]]:
    """Path and captions of every row of the index, or of one source."""
    table: pa.Table = facts.index.table.select(["source", "path", "captions"])
    if source is not None:
        table = table.filter(pc.equal(pc.cast(table.column("source"), pa.string()), source))
    for batch in table.to_batches():
        yield from zip(batch.column("path").to_pylist(), batch.column("captions").to_pylist())


def _paths(facts: Facts, chosen: np.ndarray, by: np.ndarray, text: object) -> tuple[str, ...]:
    """The worst of the chosen records, each file once."""
    assert callable(text)
    at = np.flatnonzero(chosen)
    order = at[np.argsort(-by[at], kind="stable")]
    paths = facts.index.table.column("path")
    found = dict.fromkeys((paths[int(facts.uses.row[i])].as_py(), text(by[i])) for i in order[: 4 * _LISTED])
    return tuple(f"{path}: {what}" for path, what in list(found)[:_LISTED])
