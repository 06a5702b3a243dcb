"""What a folder is: CogVideo's diffusers layout, a Hugging Face data set, shards, or media and captions."""

import re
from collections import Counter

from sat_ext.data.sources.folder import is_media, read_sidecars
from sat_ext.data.sources.listing import Folder, Notes
from sat_ext.data.sources.reach import resolve
from sat_ext.data.sources.shards import read_shards
from sat_ext.data.sources.tables import read_tables
from sat_ext.data.sources.texts import is_text, lines_of, one_line
from sat_ext.errors import DataError
from sat_ext.types import Item

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # Hugging Face's ImageFolder and VideoFolder
_PROMPTS = ("prompts.txt", "prompt.txt")
_TRAIN, _OTHER_SPLITS = ("train", "training"), ("test", "testing", "validation", "valid", "val", "dev", "eval")
_SPLIT = re.compile(rf"({'|'.join(_TRAIN + _OTHER_SPLITS)})(?=[-_./]|$)")


def read_folder(folder: Folder, notes: Notes) -> list[Item]:
    """Every item of a folder, read as what it looks like, in this order:

    1. `prompts.txt` with `videos.txt` or `images.txt`: the lines of one belong to those of the other;
    2. `metadata.jsonl`, `.csv` or `.parquet`, in it or below it: Hugging Face's tables;
    3. `.parquet` files, or 4. `.tar` files, at any depth;
    5. images and videos with a `.txt` beside each, or in `labels/`.

    Of a data set with splits (train, test, ...) only the training split is read; another's folder may be a source
    of its own. Raises `DataError`.
    """
    names = {n.lower(): n for n in folder.names if "/" not in n}
    prompts = next((p for p in _PROMPTS if p in names), None)
    if prompts and names.keys() & {"videos.txt", "images.txt"}:
        return _read_lists(folder, prompts, names, notes)
    metadata = [n for n in folder.names if n.rpartition("/")[2].lower() in _METADATA]
    if metadata:
        return _read_tables(folder, metadata, notes)
    parquet = [n for n in folder.names if n.lower().endswith(".parquet")]
    tars = [n for n in folder.names if n.lower().endswith(".tar")]
    media = next(([n] for n in folder.names if is_media(n)), [])
    kinds = [*parquet[:1], *tars[:1], *media]
    if len(kinds) > 1:
        raise DataError(
            f"{folder.root}: it holds '{kinds[0]}' and '{kinds[1]}', which may be the same data twice; put the "
            "kinds of files into folders of their own, each a source."
        )
    if parquet:
        return _read_tables(folder, parquet, notes)
    if tars:
        return read_shards([(folder.location(n), n) for n in _one_split(tars, notes)], notes)
    return read_sidecars(folder, notes)


def _read_tables(folder: Folder, names: list[str], notes: Notes) -> list[Item]:
    tables = [(folder.location(n), n[: n.rfind("/") + 1]) for n in _one_split(names, notes)]
    return read_tables(tables, notes)


def _one_split(names: list[str], notes: Notes) -> list[str]:
    """Of files that are named after splits, or lie in their folders, those of the training split, sorted."""
    splits = {name: _split_of(name) for name in sorted(names)}
    if not set(splits.values()) & set(_TRAIN):
        return list(splits)
    for name, split in splits.items():
        if split in _OTHER_SPLITS:
            notes.add("left out as of other splits than train; to use them, name them as a source", name)
    return [name for name, split in splits.items() if split not in _OTHER_SPLITS]


def _split_of(name: str) -> str | None:
    found = (_SPLIT.match(part) for part in name.lower().split("/"))
    return next((match[1] for match in found if match), None)


def _read_lists(folder: Folder, prompts: str, names: dict[str, str], notes: Notes) -> list[Item]:
    """CogVideo's layout for its diffusers `finetune/`: line by line a prompt, a clip, and for I2V a first frame.

    The first frames are not read: a clip's condition is the frame that it starts with. Without `videos.txt`,
    `images.txt` lists stills to train on.
    """
    lists = {
        n: [line.strip() for line in lines_of(folder.location(names[n])) if line.strip()]
        for n in (prompts, "videos.txt", "images.txt")
        if n in names
    }
    counts = {n: len(lines) for n, lines in lists.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in {n}" for n, count in counts.items())
        raise DataError(
            f"{folder.root}: its lists have different numbers of lines ({found}); they go line by line."
        )
    media = "videos.txt" if "videos.txt" in lists else "images.txt"
    if not counts[media]:
        raise DataError(f"{folder.root}: '{media}' is empty; write one path a line.")
    if media == "videos.txt" and "images.txt" in lists:
        notes.add(
            "first frames that are not read, as a clip's condition is the frame it starts with", "images.txt"
        )
    uses: Counter[str] = Counter()
    items = []
    for number, (file, prompt) in enumerate(zip(lists[media], lists[prompts], strict=True), start=1):
        where = f"{folder.location(names[media])}, line {number}"
        if not is_text(file):
            raise DataError(f"{where}: {file!r} is no path.")
        uses[file] += 1
        key = file if uses[file] == 1 else f"{file}#{uses[file]}"
        path = resolve(folder.root, file, where, notes.reach)
        items.append(Item(path=path, key=key, captions=(one_line(prompt),)))
    return items
