"""`sat-ext scenes`: where long takes are cut, as a table of clips that do not cross a cut."""

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from sat_ext.cli.base import require_file, write_file
from sat_ext.data.index import probe_files
from sat_ext.data.sources import read_source
from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.files import container_of, is_url, suffix_of
from sat_ext.types import IMAGE_EXTENSIONS, Item

TIMEOUT = 3600.0  # seconds a file: every frame of it is decoded


def scenes(
    source: Annotated[str, typer.Argument(help="a folder or table of clips")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the table (JSONL), to train on in their place")],
    shortest: Annotated[float, typer.Option(min=0.0, help="seconds; shorter clips are left out")] = 1.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for one file")] = TIMEOUT,
) -> None:
    """Find the cuts in clips, with PySceneDetect, and write a row with start and end for each part between them.

    Nothing is encoded again. A part has its file's captions; stills are kept as they are."""
    try:
        import scenedetect  # noqa: F401
    except ImportError as error:
        raise ConfigError('scenes: needs PySceneDetect; run pip install "sat_ext[scenes]".') from error
    if output.suffix != ".jsonl":
        raise ConfigError(f"-o: {output} is not the name of a table; write one that ends in .jsonl.")
    require_file(output, new=True)
    items = read_source(source, captions_required=False)
    if inside := next((i.path for i in items if container_of(i.path) != i.path or is_url(i.path)), None):
        raise DataError(f"{source}: a table cannot name {inside}; scenes reads local files.")
    clips = [item for item in items if suffix_of(item.path) not in IMAGE_EXTENSIONS]
    paths = list(dict.fromkeys(item.path for item in clips))
    found = probe_files(paths, timeout=timeout, look=takes_in, setting="--timeout")
    shown = track(found, "finding cuts", total=len(paths), console=Console(stderr=True))
    takes: dict[str, Any] = {path: outcome for path, (outcome, _) in zip(paths, shown)}
    rows: list[dict[str, Any]] = []
    lengths, too_short = [], 0
    for item in items:
        if item.path not in takes:
            rows.append(_row(item, output))
            continue
        if isinstance(takes[item.path], MediaError):
            continue
        for begin, end in takes[item.path]:
            begin, end = max(begin, item.start), min(end, item.end or end)
            if end - begin >= max(shortest, 1e-3):
                rows.append({**_row(item, output), "start": round(begin, 6), "end": round(end, 6)})
                lengths.append(end - begin)
            else:
                too_short += end > begin
    for outcome in takes.values():
        if isinstance(outcome, MediaError):
            print(f"left out, fix or remove it: {outcome}", file=sys.stderr)
    if not lengths:
        raise DataError(f"{source}: no clip of {shortest:g} s or more between two cuts; lower --shortest.")
    write_file(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    cut = sum(len(parts) > 1 for parts in takes.values() if not isinstance(parts, MediaError))
    print(f"{output}: {len(lengths)} clips of {len(paths)} files, {cut} of which have cuts", end="")
    print(f"; median {median(lengths):.1f} s", end="")
    print(f"; {too_short} of less than {shortest:g} s left out" if too_short else "", end="")
    print(f"; {len(rows) - len(lengths)} stills" if len(rows) > len(lengths) else "")
    root = os.path.commonpath([os.path.dirname(os.path.abspath(item.path)) for item in items])
    if not os.path.join(root, "").startswith(os.path.join(output.absolute().parent, "")):
        print(f"The table lies outside the media: add 'allowed_roots: [{root}]' to data.params.")


def takes_in(path: str) -> list[tuple[float, float]]:
    """Start and end of every take of a clip, in seconds after its first frame. Raises `MediaError`."""
    from scenedetect import AdaptiveDetector, SceneManager, VideoOpenFailure
    from scenedetect.backends.pyav import VideoStreamAv

    try:
        # frames by their own times and not by number, so that a varying rate shifts no cut
        video = VideoStreamAv(path, suppress_output=True)
        manager = SceneManager()
        manager.add_detector(AdaptiveDetector(min_scene_len=2))  # by default it misses a cut soon after another
        manager.detect_scenes(video)
    except (VideoOpenFailure, OSError, ValueError) as error:
        raise MediaError(path, f"cannot be searched for cuts ({error})") from error
    found = manager.get_scene_list(start_in_scene=True)
    if not found:
        raise MediaError(path, "no frame of it can be decoded")
    return [(begin.seconds, end.seconds) for begin, end in found]


def _row(item: Item, output: Path) -> dict[str, Any]:
    folder = output.absolute().parent
    path = os.path.abspath(item.path)
    row: dict[str, Any] = {"path": os.path.relpath(path, folder) if path.startswith(f"{folder}/") else path}
    row |= {"caption": item.captions[0]} if len(item.captions) == 1 else {"captions": list(item.captions)}
    for name in ("caption_weights", "crop", "fps"):
        if value := getattr(item, name):
            row[name] = value
    return row | ({"weight": item.weight} if item.weight != 1 else {})
