"""`sat-ext check`: what there is in a data set, what is broken, why, and what to do about it."""

import json
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

from sat_ext.caption_lengths import too_long
from sat_ext.cli.base import probing
from sat_ext.data.clips import find_sampler
from sat_ext.data.columns import item_batches
from sat_ext.data.decode import read_still
from sat_ext.data.index import longest_is_rare, probe_files
from sat_ext.data.index.build import infos_of
from sat_ext.data.index.lengths import LEFT_OUT, is_too_short
from sat_ext.data.index.place import placer
from sat_ext.data.index.probing import Probe
from sat_ext.data.parts import part_info
from sat_ext.data.probe import probe as probe_file
from sat_ext.data.sources import check_roots, read_source
from sat_ext.data.sources.texts import listed
from sat_ext.data.transform import Fit
from sat_ext.errors import ConfigError, MediaError
from sat_ext.files import suffix_of
from sat_ext.media import frames_of, is_webp, open_image, open_video
from sat_ext.recipe import Recipe, read_recipe
from sat_ext.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Item, MediaInfo

TIMEOUT, FULL_TIMEOUT = 60.0, 1800.0  # seconds a file: an hour of 1080p takes about ten minutes to decode
_THUMB = Fit(16, 16)  # a JPEG's scan is read to its end for it, but most of its pixels are never made
_MOST_ROWS = 12  # of a table
_LENGTHS = (1, 2, 5, 10, 30, 60)  # seconds
_LENGTH_NAMES = (*(f"{a} to {b} s" for a, b in pairwise((0, *_LENGTHS))), f"{_LENGTHS[-1]} s and longer")

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
    """One file: what it holds, or why it is bad. `caption` is None if it has none."""

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
        held = {n: getattr(self.info, n, None) for n in ("width", "height", "frames", "fps", "codec")}
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
    as_json: Annotated[
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

    With --base, a file without a caption counts too, as training would refuse its source. Under torchrun
    (`-m sat_ext.cli.main check --base ...`) the ranks share the files, and what these hold is kept for the run.
    """
    run = read_recipe([*base, *(paths or [])]).checked() if base else None
    options: dict[str, Any] = {"full": full, "timeout": timeout or (FULL_TIMEOUT if full else TIMEOUT)}
    check_all = partial(_check, paths or [], run, allow or [], as_json, **options)
    if run and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from sat_ext.cli.cache import join  # imports SAT
        from sat_ext.sat.broadcast import share_from_first_rank
        from sat_ext.sat.probing import probe_on_all_ranks

        join()
        is_fine = share_from_first_rank(lambda: check_all(probe=probe_on_all_ranks))
    else:
        is_fine = check_all(probe=probe_files)
    if not is_fine:
        raise typer.Exit(1)


def _check(
    paths: Sequence[str], run: Recipe | None, allow: Sequence[str], as_json: bool, probe: Probe, **options: Any
) -> bool:
    """Print what is found; whether nothing is bad."""
    sources = _sources(paths, run, allow)
    items: dict[str, list[Item]] = {}
    for item in (item for own in sources.values() for item in own):
        items.setdefault(item.path, []).append(item)
    if run:  # kept for its start
        batches = {path: list(item_batches(own)) for path, own in sources.items()}
        infos_of(batches, run.data, probing(Console(stderr=True)), probe)
    found = _check_items(items, probe, **options)
    files = []
    for file in track(found, "checking files", total=len(items), console=Console(stderr=True)):
        if as_json:
            print(json.dumps(file.row()))
        files.append(file)
    if not as_json:
        _print_summary(files)
    warnings = [*run.doubts] if run else []
    if bare := [f for f in files if f.caption is None]:
        verdict = "training refuses the source" if run else "it cannot be trained on as it is"
        text = f"{len(bare)} of {len(files)} files have no caption ({bare[0].path} for one): {verdict}"
        warnings.insert(0, f"{_printable(text)}; write a text file beside each, or a table.")
    if run and (rare := longest_is_rare(_clip_lengths(run, sources, files), run.data)):
        warnings.append(f"{'; '.join(rare)}.")
    if run:
        warnings += _long_captions(run, sources)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return not (any(f.kind == "bad" for f in files) or (bare and run))


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


def _check_items(items: dict[str, list[Item]], probe: Probe, *, full: bool, timeout: float) -> Iterator[Checked]:
    """Each file, in order, looked at in a process of its own, many side by side. `timeout` is in seconds."""
    outcomes = probe(items, timeout=timeout, look=partial(look, full=full), setting="--timeout")
    for (path, own), (outcome, _) in zip(items.items(), outcomes):
        caption = next((c for item in own for c in item.captions), None)
        try:
            if isinstance(outcome, MediaError):
                raise outcome
            for item in own:  # a row's start, end or crop may not fit its file
                part_info(item, outcome)
            yield Checked(path=path, caption=caption, info=outcome, reason=None)
        except MediaError as error:
            yield Checked(path=path, caption=caption, info=None, reason=error.reason)


def look(path: str, *, full: bool) -> MediaInfo:
    """Probe a file; decode it if it is a still, or in any case with `full`. Raises `MediaError`."""
    info = probe_file(path)
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


def _clip_lengths(run: Recipe, sources: Mapping[str, Sequence[Item]], files: Iterable[Checked]) -> Counter[int]:
    """As `data.index.clip_lengths`, of what the run trains on, without the index that probes every file again."""
    infos = {f.path: f.info for f in files}
    lengths: Counter[int] = Counter()
    for source in run.sources:
        place = placer(source, run.buckets, run.data)
        for item in () if find_sampler(source.sampler).still else sources[source.path]:
            info = infos[item.path]
            if info is None or item.weight == 0 or (part := part_info(item, info)).frames == 1:
                continue
            verdict = place(part)
            if isinstance(verdict, tuple):
                lengths[run.buckets[verdict[0]].frames] += 1
            elif verdict is not None and is_too_short(verdict):
                lengths[LEFT_OUT] += 1
    return lengths


def _long_captions(run: Recipe, sources: Mapping[str, Sequence[Item]]) -> Iterator[str]:
    """A warning about captions of which the model reads the start only, if there are any."""
    captions: dict[str, list[str]] = {}
    for source in run.sources:
        rule = source.caption or run.data.caption
        captions |= {i.path: [c for text in i.captions for c in rule.of(text)] for i in sources[source.path]}
    long, limit = too_long(captions.items(), run)
    if long:
        yield (
            f"{len(long)} of {len(captions)} files have a caption of more than the {limit} that the model reads "
            f"({listed(long)}): the rest is cut off; put what matters first, or shorten them."
        )


def _print_summary(files: Sequence[Checked]) -> None:
    """Tables of what there is, and each bad file with its reason and remedy."""
    held = [f.info for f in files if f.info is not None]
    clips = [i for i in held if i.kind == "video"]
    tables = []
    if held:
        tables.append(_table("Codec", Counter(f"{f.kind} {f.info.codec}" for f in files if f.info).most_common()))
        tables.append(_table("Size", Counter(f"{i.width}x{i.height}" for i in held).most_common()))
    if clips:
        lengths = Counter(_LENGTH_NAMES[bisect_right(_LENGTHS, i.duration)] for i in clips)
        tables.append(_table("Length", [(n, lengths[n]) for n in _LENGTH_NAMES if lengths[n]]))
        tables.append(_table("Frames a second", Counter(f"{i.fps:.4g}" for i in clips).most_common()))
    Console().print(Columns(tables))
    bad = [(f.path, f.reason) for f in files if f.reason is not None]
    if bad:
        print("Bad files")
    for path, reason in bad:
        advice = "" if ";" in reason else f"; {remedy(reason)}"
        print(f"  {_printable(path)}\n    {_printable(reason)}{advice}")
    length = f" of {sum(i.duration for i in clips):,.1f} s together" if clips else ""
    print(f"{len(files)} files: {len(clips)} clips{length}, {len(held) - len(clips)} images, {len(bad)} bad")


def remedy(reason: str) -> str:
    """What to do about a bad file.

    >>> remedy("truncated: its index reaches to byte 9000 of 4000")
    'copy or download it again'
    """
    lower = reason.lower()
    return next((what for words, what in _REMEDIES if any(w in lower for w in words)), _OTHERWISE)


def _table(title: str, counts: Sequence[tuple[str, int]]) -> Table:
    table = Table(title, box=box.SIMPLE_HEAD)
    table.add_column("Files", justify="right")
    for value, files in counts[:_MOST_ROWS]:
        table.add_row(Text(value), f"{files:,}")
    if rest := counts[_MOST_ROWS:]:
        table.add_row(f"{len(rest)} others", f"{sum(files for _, files in rest):,}")
    return table


def _printable(text: str) -> str:
    """On one line, whatever a file's name holds: control characters and bad UTF-8 as escapes."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)
