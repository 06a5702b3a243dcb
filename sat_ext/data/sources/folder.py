"""What a folder is: CogVideo's diffusers layout, a Hugging Face data set, shards, or media and captions."""

import os
import re
from collections.abc import Iterable
from functools import cached_property

import pyarrow as pa

from sat_ext.data.columns import item_batches
from sat_ext.data.sources.listing import Folder, Notes, is_media, list_folder
from sat_ext.data.sources.reach import resolve
from sat_ext.data.sources.shards import read_shards
from sat_ext.data.sources.tables import ReadRow, collect, read_tables
from sat_ext.data.sources.texts import by_folded, folded, lines_of, listed, one_line
from sat_ext.errors import DataError
from sat_ext.files import is_url
from sat_ext.types import MEDIA_EXTENSIONS, Item

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # Hugging Face's ImageFolder and VideoFolder
_PROMPTS = ("prompts.txt", "prompt.txt")
_TRAIN, _OTHER_SPLITS = ("train", "training"), ("test", "testing", "validation", "valid", "val", "dev", "eval")
_SPLIT = re.compile(rf"({'|'.join(_TRAIN + _OTHER_SPLITS)})(?=[-_./]|$)")

# CogVideo's layout: videos/x.mp4 has its caption in labels/x.txt.
_LABELLED_FOLDERS = frozenset({"videos", "images"})


def read_folder(folder: Folder, notes: Notes) -> Iterable[pa.RecordBatch]:
    """Every item of a folder, read as what it looks like, in this order:

    1. `prompts.txt` with `videos.txt` or `images.txt`: the lines of one belong to those of the other;
    2. `metadata.jsonl`, `.csv` or `.parquet`, in it or below it: Hugging Face's tables;
    3. `.parquet` files, or 4. `.tar` files, at any depth;
    5. images and videos with a `.txt` beside each, or in `labels/`.

    Of a data set with splits (train, test, ...) only the training split is read. Raises `DataError`.
    """
    names = {n.lower(): n for n in folder.names if "/" not in n}
    prompts = next((p for p in _PROMPTS if p in names), None)
    if prompts and names.keys() & {"videos.txt", "images.txt"}:
        return _read_lists(folder, prompts, names, notes)
    metadata = [n for n in folder.names if n.rpartition("/")[2].lower() in _METADATA]
    parquet = metadata or [n for n in folder.names if n.lower().endswith(".parquet")]
    tars = [n for n in folder.names if n.lower().endswith(".tar")]
    kinds = [*parquet[:1], *tars[:1], *([n for n in folder.names if is_media(n)][:1])]
    if len(kinds) > 1 and not metadata:
        raise DataError(
            f"{folder.root}: it holds '{kinds[0]}' and '{kinds[1]}', which may be the same data twice; put the "
            "kinds of files into folders of their own, each a source."
        )
    if parquet:
        tables = _one_split(parquet, notes)
        return read_tables([(folder.location(n), n[: n.rfind("/") + 1]) for n in tables], notes)
    if tars:
        return read_shards([(folder.location(n), n) for n in _one_split(tars, notes)], notes)
    return _read_sidecars(folder, notes)


def _one_split(names: list[str], notes: Notes) -> list[str]:
    """Of files that are named after splits, or lie in their folders, those of the training split, sorted."""
    splits: dict[str, str | None] = dict.fromkeys(sorted(names))
    for name in splits:
        found = (_SPLIT.match(part) for part in name.lower().split("/"))
        splits[name] = next((match[1] for match in found if match), None)
    if not set(splits.values()) & set(_TRAIN):
        return list(splits)
    for name, split in splits.items():
        if split in _OTHER_SPLITS:
            notes.add("left out as of other splits than train; to use them, name them as a source", name)
    return [name for name, split in splits.items() if split not in _OTHER_SPLITS]


def _read_lists(folder: Folder, prompts: str, names: dict[str, str], notes: Notes) -> Iterable[pa.RecordBatch]:
    """CogVideo's layout for its diffusers `finetune/`: line by line a prompt, a clip, and for I2V a first frame.

    Without `videos.txt`, `images.txt` lists stills to train on.
    """
    lists = {
        n: [line.strip() for line in lines_of(folder.location(names[n])) if line.strip()]
        for n in (prompts, "videos.txt", "images.txt")
        if n in names
    }
    counts = {n: len(lines) for n, lines in lists.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} in {n}" for n, count in counts.items())
        raise DataError(f"{folder.root}: its lists have different numbers of lines ({found}); fix the lists.")
    media = "videos.txt" if "videos.txt" in lists else "images.txt"
    if not counts[media]:
        raise DataError(f"{folder.root}: '{media}' is empty; write one path a line.")
    if media == "videos.txt" and "images.txt" in lists:
        notes.add(
            "first frames that are not read, as a clip's condition is the frame it starts with", "images.txt"
        )
    rows: list[ReadRow] = []
    for number, (file, prompt) in enumerate(zip(lists[media], lists[prompts]), start=1):
        where = f"{folder.location(names[media])}, line {number}"
        path = resolve(folder.root, file, where, notes.reach)
        rows.append((where, file, path, {"captions": (one_line(prompt),)}))
    return collect(rows, folder.root, "", notes)


def _read_sidecars(folder: Folder, notes: Notes) -> Iterable[pa.RecordBatch]:
    """Images and videos with their captions: x.txt beside x, or labels/x.txt if x lies in videos/ or images/."""
    captions = _Captions(folder, notes)
    found: dict[str, tuple[str, str] | None] = {}
    for name in folder.names:
        if is_media(name):
            found[name] = captions.find(name)
        else:
            notes.leave_out(name)
    bare = sorted(name for name, place in found.items() if place is None)
    if bare and notes.captions_required:
        looked = " and ".join(f"'{root}/{wanted}'" for root, wanted in captions.candidates(bare[0]))
        raise DataError(
            f"{folder.root}: {len(bare)} of {len(found)} media files have no caption ({listed(bare)}; looked for "
            f"{looked}); write one text file for each, or list the files in a .jsonl or .csv."
        )
    if not found:
        others = f", but {sum(notes.unread.values())} files ending in {', '.join(sorted(notes.unread))}"
        raise DataError(
            f"{folder.root}: no image or video in this folder or below it{others if notes.unread else ''}; "
            f"known are {' '.join(sorted(MEDIA_EXTENSIONS))}."
        )
    captions_of: dict[str, tuple[str]] = {}
    for root, texts in captions.texts.items():
        own = {media: place[1] for media, place in found.items() if place and place[0] == root}
        for media, text in zip(own, texts.folder.captions(list(own.values()), notes), strict=True):
            captions_of[media] = (one_line(text),)
    return item_batches(
        Item(path=folder.location(name), key=name, captions=captions_of.get(name, ())) for name in found
    )


class _Captions:
    """Finds the captions of a folder's files. If it is `videos/` itself, `labels/` lies beside it."""

    def __init__(self, folder: Folder, notes: Notes) -> None:
        self.texts = {folder.root: _Texts(folder)}
        self._root, self._notes = folder.root, notes
        root = folder.root if is_url(folder.root) else os.path.abspath(folder.root)
        self._outer_root, up = _labels(root, 3 if is_url(root) else 1)
        if self._outer_root is not None:
            notes.reach.add(up or "/", self._outer_root.removeprefix(up + "/"))

    def candidates(self, media: str) -> list[tuple[str, str]]:
        """Where a file's caption may be, best first: the folder, and the name in it."""
        beside = os.path.splitext(media)[0] + ".txt"
        label, _ = _labels(beside, 0, last=-1)
        if label is not None:
            return [(self._root, beside), (self._root, label)]
        return [(self._root, beside)] + ([(self._outer_root, beside)] if self._outer_root is not None else [])

    def find(self, media: str) -> tuple[str, str] | None:
        """The one of `candidates` that is there, by the name that it has there."""
        for root, wanted in self.candidates(media):
            if root not in self.texts:  # the folder outside, which may be large, or not ours to read
                self.texts[root] = _Texts(list_folder(root, self._notes))
            if name := self.texts[root].find(wanted):
                return root, name
        return None


def _labels(path: str, first: int, last: int | None = None) -> tuple[str | None, str]:
    """`path` with its innermost `videos` or `images` replaced by `labels`, and the part before it."""
    parts = path.split("/")
    for i in reversed(range(first, len(parts[:last]))):
        if parts[i].lower() in _LABELLED_FOLDERS:
            return "/".join((*parts[:i], "labels", *parts[i + 1 :])), "/".join(parts[:i])
    return None, ""


class _Texts:
    """The text files of a folder, found by name or, failing that, regardless of case and accents."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._names = {n for n in folder.names if n.lower().endswith(".txt")}
        self._taken: dict[str, str] = {}

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        return by_folded(self._names)

    def find(self, wanted: str) -> str | None:
        """The name of the caption `wanted`. Raises `DataError` if that is ambiguous."""
        name: str | None = wanted
        if wanted not in self._names:
            alike = self._alike.get(folded(wanted), [])
            if len(alike) > 1:
                raise DataError(
                    f"{self.folder.root}: '{wanted}' is not there, and {listed(sorted(alike))} may be meant; give "
                    "the file and its caption the same name."
                )
            name = alike[0] if alike else None
        # x.jpg and X.jpg would share x.txt; x.jpg and x.mp4 may, as they want the same name.
        if name is not None and self._taken.setdefault(name, wanted) != wanted:
            raise DataError(
                f"{self.folder.root}: '{name}' may be the caption of two files, as '{wanted}' and as "
                f"'{self._taken[name]}'; give each file a caption of the same name."
            )
        return name
