"""`sat-ext check`: what there is in a data set, what is broken, why, and what to do about it."""

import json as json_text
import os
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import typer
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from sat_ext.data.clips import find_sampler
from sat_ext.data.decode import read_still
from sat_ext.data.index import longest_is_rare, probe_files
from sat_ext.data.index.lengths import LEFT_OUT, is_too_short
from sat_ext.data.index.place import placer
from sat_ext.data.parts import part_info
from sat_ext.data.probe import probe
from sat_ext.data.sources import check_roots, read_source
from sat_ext.data.transform import Fit
from sat_ext.errors import ConfigError, MediaError
from sat_ext.files import suffix_of
from sat_ext.media import frames_of, is_webp, open_image, open_video
from sat_ext.recipe import Recipe, read_recipe
from sat_ext.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Item, MediaInfo

TIMEOUT, FULL_TIMEOUT = 60.0, 1800.0  # seconds a file: an hour of 1080p takes about ten minutes to decode
# What a still is decoded to: a JPEG's scan is read to its end, but its pixels are not all made.
_THUMB = Fit(16, 16)
_MOST_ROWS = 12  # of a table

# What to do, by what a reason says; the first that fits.
_REMEDIES = (
    (("truncated", "damaged", "empty", "missing", "not whole"), "copy or download it again"),
    (("no such file", "does not exist", "not a regular file"), "correct its path in the table, or remove it"),
    (("over the limit",), "make it smaller"),
    (("longer than",), "convert it with ffmpeg, raise --timeout, or remove it"),
    (("permission",), "make it readable"),
    (("no video stream",), "remove it: it has no pictures"),
)
_OTHERWISE = "copy it again, convert it, or remove it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One file: what it holds, or why it is bad. `caption` is None where it has none."""

    path: str
    caption: str | None
    info: MediaInfo | None
    reason: str | None

    @property
    def kind(self) -> str:
        """image, clip or bad."""
        if self.info is None:
            return "bad"
        return "image" if self.info.kind == "image" else "clip"

    def row(self) -> dict[str, object]:
        """The object that `--json` prints."""
        names = ("width", "height", "frames", "fps", "codec")
        held = {name: getattr(self.info, name) if self.info else None for name in names}
        return {"path": self.path, "kind": self.kind, **held, "caption": self.caption, "reason": self.reason}


def check(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="folders, tables, shards or single files", show_default=False),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option("--base", metavar="YAML...", help="check all data of a run's YAML files instead"),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object a line for each file, and nothing else")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="decode every frame of every clip, too (slow)")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="ROOT", help="a folder, or sftp://, that names and links in the data may lead to"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="seconds for one file; default 60, with --full 1800")
    ] = None,
) -> None:
    """Probe every file and decode every still; exit with 1 when a file is bad, with 2 for a wrong call.

    With --base, a file without a caption counts too, as training would refuse its source.
    """
    run = read_recipe([*base, *(paths or [])]).checked() if base else None
    sources = _sources(paths or [], run, allow or [])
    items: dict[str, list[Item]] = {}
    for item in (item for own in sources.values() for item in own):
        items.setdefault(item.path, []).append(item)
    seconds = timeout or (FULL_TIMEOUT if full else TIMEOUT)
    console = Console(stderr=True)
    found = check_items(items, full=full, timeout=seconds)
    files = []
    for file in track(found, "checking files", total=len(items), console=console):
        if json:
            sys.stdout.write(json_text.dumps(file.row()) + "\n")
        files.append(file)
    sys.stdout.flush()
    if not json:
        _print_summary(files)
    bare = [f for f in files if f.caption is None]
    if bare:
        verdict = "training refuses the source" if run else "it cannot be trained on as it is"
        text = f"{len(bare)} of {len(files)} files have no caption ({bare[0].path} for one): {verdict}"
        print(f"warning: {_printable(text)}; write a text file beside each, or a table.", file=sys.stderr)
    for sentence in run.doubts if run else ():
        print(f"warning: {sentence}", file=sys.stderr)
    if run and (rare := longest_is_rare(_clip_lengths(run, sources, files), run.data)):
        print(f"warning: {'; '.join(rare)}.", file=sys.stderr)
    if any(f.kind == "bad" for f in files) or (bare and run):
        raise typer.Exit(1)


def _sources(paths: Sequence[str], run: Recipe | None, allow: Sequence[str]) -> dict[str, list[Item]]:
    """The items of each source, by its path."""
    check_roots(allow, "--allow")
    if run:
        allow = [*allow, *run.data.allowed_roots]
        paths = [s.path for s in (*run.sources, *run.held_out)]
    elif not paths:
        raise ConfigError(
            "check: nothing to check; name a folder, a table or a file, or --base with the run's YAML."
        )
    return {source: _read(source, allow) for source in dict.fromkeys(paths)}


def _read(source: str, allow: Sequence[str]) -> list[Item]:
    if suffix_of(source) in IMAGE_EXTENSIONS | VIDEO_EXTENSIONS and not os.path.isdir(source):
        return [Item(path=source, key=source, captions=())]  # a single file
    return read_source(source, captions_required=False, allowed_roots=allow)


def check_items(items: dict[str, list[Item]], *, full: bool, timeout: float) -> Iterator[Checked]:
    """Each file, in order, looked at in a process of its own, many side by side. `timeout` is in seconds."""
    outcomes = probe_files(items, timeout=timeout, look=partial(look, full=full), setting="--timeout")
    for (path, own), (outcome, _) in zip(items.items(), outcomes):
        caption = next((c for item in own for c in item.captions), None)
        reason = outcome.reason if isinstance(outcome, MediaError) else _part_reason(own, outcome)
        info = None if reason is not None or isinstance(outcome, MediaError) else outcome
        yield Checked(path=path, caption=caption, info=info, reason=reason)


def look(path: str, *, full: bool) -> MediaInfo:
    """Probe a file; decode it if it is a still, or in any case with `full`. Raises `MediaError`."""
    info = probe(path)
    if suffix_of(path) in IMAGE_EXTENSIONS and info.frames == 1:
        read_still(path, fit=_THUMB)
    elif full:
        _decode_all(path)
    return info


def _decode_all(path: str) -> None:
    if is_webp(path):  # FFmpeg does not read animated ones
        with open_image(path) as image:
            for _ in frames_of(image):
                pass
        return
    with open_video(path) as (container, stream):
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise MediaError(path, f"the data of its frame at {frame.time or 0:.3f} s is damaged")


def _part_reason(items: Iterable[Item], info: MediaInfo) -> str | None:
    """Why a row's start, end or crop does not fit its file."""
    for item in items:
        try:
            part_info(item, info)
        except MediaError as error:
            return error.reason
    return None


def _clip_lengths(run: Recipe, sources: Mapping[str, Sequence[Item]], files: Iterable[Checked]) -> Counter[int]:
    """As `data.index.clip_lengths`, of what the run trains on."""
    infos = {f.path: f.info for f in files}
    lengths: Counter[int] = Counter()
    for source in run.sources:
        place = placer(source.sampler, run.buckets, run.data)
        for item in () if find_sampler(source.sampler).still else sources[source.path]:
            info = infos[item.path]
            if info is None or item.weight == 0 or (part := part_info(item, info)).frames == 1:
                continue
            verdict = place(part)
            if not isinstance(verdict, str):
                lengths[run.buckets[verdict[0]].frames] += 1
            elif is_too_short(verdict):
                lengths[LEFT_OUT] += 1
    return lengths


def _print_summary(files: Sequence[Checked]) -> None:
    """Tables of what there is, and each bad file with its reason and remedy."""
    console = Console()
    held = [f.info for f in files if f.info is not None]
    clips = [i for i in held if i.kind == "video"]
    tables = []
    if held:
        tables.append(_table("Codec", Counter((f.kind, f.info.codec) for f in files if f.info), "Kind"))
        tables.append(_table("Size", Counter(f"{i.width}x{i.height}" for i in held)))
    if clips:
        tables.append(_table("Length", Counter(_length(i.duration) for i in clips), order=_LENGTH_NAMES))
        tables.append(_table("Frames a second", Counter(f"{i.fps:.4g}" for i in clips)))
    console.print(Columns(tables))
    bad = [f for f in files if f.reason is not None]
    if bad:
        print("Bad files")
    for file in bad:
        assert file.reason is not None
        advice = "" if ";" in file.reason else f"; {remedy(file.reason)}"
        print(f"  {_printable(file.path)}\n    {_printable(file.reason)}{advice}")
    images, seconds = len(held) - len(clips), sum(i.duration for i in clips)
    length = f" of {seconds:,.1f} s together" if clips else ""
    print(f"{len(files)} files: {len(clips)} clips{length}, {images} images, {len(bad)} bad")


def remedy(reason: str) -> str:
    """What to do about a bad file.

    >>> remedy("truncated: its index reaches to byte 9000 of 4000")
    'copy or download it again'
    """
    lower = reason.lower()
    return next((what for words, what in _REMEDIES if any(w in lower for w in words)), _OTHERWISE)


_LENGTHS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds
_LENGTH_NAMES = (
    f"under {_LENGTHS[0]:g} s",
    *(f"{a:g} to {b:g} s" for a, b in pairwise(_LENGTHS)),
    f"{_LENGTHS[-1]:g} s and longer",
)


def _length(seconds: float) -> str:
    return _LENGTH_NAMES[bisect_right(_LENGTHS, seconds)]


def _table(
    title: str, counts: Mapping[Any, int], first: str | None = None, order: Sequence[str] | None = None
) -> Table:
    """Counts by value, the most frequent first or in `order`; a value of two parts has two columns."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in (first, title) if first else (title,):
        table.add_column(name)
    table.add_column("Files", justify="right")
    values = sorted(counts, key=lambda v: (-counts[v], v)) if order is None else [v for v in order if counts[v]]
    for value in values[:_MOST_ROWS]:
        cells = value if isinstance(value, tuple) else (value,)
        table.add_row(*(Text(str(c)) for c in cells), f"{counts[value]:,}")
    if len(values) > _MOST_ROWS:
        rest = values[_MOST_ROWS:]
        cells = ("",) * (1 if first else 0)
        table.add_row(*cells, f"{len(rest)} others", f"{sum(counts[v] for v in rest):,}")
    return table


def _printable(text: str) -> str:
    """On one line, whatever a file's name holds: control characters and bad UTF-8 as escapes."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)
