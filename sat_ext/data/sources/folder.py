"""What a folder is: CogVideo's diffusers layout, a Hugging Face data set, shards, or media and captions."""

import os
import re
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from sat_ext.data.columns import ROWS
from sat_ext.data.sources.arrow import items_of
from sat_ext.data.sources.listing import Folder, Notes, list_folder
from sat_ext.data.sources.reach import resolve
from sat_ext.data.sources.shards import read_shards
from sat_ext.data.sources.tables import ReadRow, collect, read_tables
from sat_ext.data.sources.texts import LISTED, by_folded, folded, lines_of, listed, one_line
from sat_ext.errors import DataError
from sat_ext.files import is_url
from sat_ext.types import MEDIA_EXTENSIONS, OTHER_EXTENSIONS

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # Hugging Face's ImageFolder and VideoFolder
_PROMPTS = ("prompts.txt", "prompt.txt")
_TRAIN, _OTHER_SPLITS = ("train", "training"), ("test", "testing", "validation", "valid", "val", "dev", "eval")
_SPLIT = re.compile(rf"({'|'.join(_TRAIN + _OTHER_SPLITS)})(?=[-_./]|$)")

# CogVideo's layout: videos/x.mp4 has its caption in labels/x.txt.
_LABELLED_FOLDERS = frozenset({"videos", "images"})
_LABELLED = r"(?s)^((?:.*/)?)(?i:videos|images)/"  # the innermost of them
_MEDIA, _READ = (
    rf"(?i)\.(?:{'|'.join(sorted(suffix[1:] for suffix in suffixes))})$"
    for suffixes in (MEDIA_EXTENSIONS, MEDIA_EXTENSIONS | OTHER_EXTENSIONS)
)


def read_folder(folder: Folder, notes: Notes) -> Iterable[pa.RecordBatch]:
    """Every item of a folder, read as what it looks like, in this order:

    1. `prompts.txt` with `videos.txt` or `images.txt`: the lines of one belong to those of the other;
    2. `metadata.jsonl`, `.csv` or `.parquet`, in it or below it: Hugging Face's tables;
    3. `.parquet` files, or 4. `.tar` files, at any depth;
    5. images and videos with a `.txt` beside each, or in `labels/`.

    Of a data set with splits (train, test, ...) only the training split is read. Raises `DataError`.
    """
    names = {n.lower(): n for n in matching(folder.names, r"(?i)^(?:prompts?|videos|images)\.txt$").to_pylist()}
    prompts = next((p for p in _PROMPTS if p in names), None)
    if prompts and names.keys() & {"videos.txt", "images.txt"}:
        return _read_lists(folder, prompts, names, notes)
    others = matching(folder.names, r"(?i)\.(?:parquet|tar|jsonl|csv)$").to_pylist()
    metadata = [n for n in others if n.rpartition("/")[2].lower() in _METADATA]
    parquet = metadata or [n for n in others if n.lower().endswith(".parquet")]
    tars = [n for n in others if n.lower().endswith(".tar")]
    media = matching(folder.names, _MEDIA)
    kinds = [*parquet[:1], *tars[:1], *media[:1].to_pylist()]
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
    return _read_sidecars(folder, media, notes)


def matching(names: pa.Array, pattern: str, *, not_these: bool = False) -> pa.Array:
    """Those of the names that match, or that do not."""
    found = pc.match_substring_regex(names, pattern)
    return names.filter(pc.invert(found) if not_these else found)


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


def _read_sidecars(folder: Folder, media: pa.Array, notes: Notes) -> Iterator[pa.RecordBatch]:
    """Images and videos with their captions: x.txt beside x, or labels/x.txt if x lies in videos/ or images/."""
    for name in matching(folder.names, _READ, not_these=True).to_pylist():
        notes.leave_out(name)
    captions = _Captions(folder, notes)
    found = captions.find(media)
    captioned = reduce(pc.or_, (names.is_valid() for _, names in found))
    bare = media.filter(pc.invert(captioned))
    if len(bare) and notes.captions_required:
        some = bare.take(pc.array_sort_indices(bare)[:LISTED]).to_pylist()
        looked = " and ".join(f"'{root}/{wanted}'" for root, wanted in captions.candidates(some[0]))
        raise DataError(
            f"{folder.root}: {len(bare)} of {len(media)} media files have no caption ({listed(some, len(bare))}; "
            f"looked for {looked}); write one text file for each, or list the files in a .jsonl or .csv."
        )
    if not len(media):
        others = f", but {sum(notes.unread.values())} files ending in {', '.join(sorted(notes.unread))}"
        raise DataError(
            f"{folder.root}: no image or video in this folder or below it{others if notes.unread else ''}; "
            f"known are {' '.join(sorted(MEDIA_EXTENSIONS))}."
        )
    texts = pa.nulls(len(media), pa.large_string())
    for texts_folder, names in found:
        texts = pc.replace_with_mask(texts, names.is_valid(), texts_folder.captions(names.drop_null(), notes))
    paths = folder.locations(media)
    for first in range(0, len(media), ROWS):
        rows = pa.array(range(first, min(first + ROWS, len(media))))
        # no slices: Arrow's `ascii_lower` of one that was cast is damaged
        path, key, text = (column.take(rows).cast(pa.string()) for column in (paths, media, texts))
        yield items_of(path, key, text)


class _Captions:
    """Finds the captions of a folder's files. If it is `videos/` itself, `labels/` lies beside it."""

    def __init__(self, folder: Folder, notes: Notes) -> None:
        self._texts = _Texts(folder)
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

    def find(self, media: pa.Array) -> list[tuple[Folder, pa.Array]]:
        """Folders, and for each of `media` the name that its caption has in it: the first of `candidates` that is
        there. Null where that is not in this folder."""
        beside = pc.replace_substring_regex(media, r"\.[^./]*$", ".txt")
        names = self._texts.find(beside)
        found = [(self._texts.folder, names)]
        if not names.null_count:
            return found
        label = pc.replace_substring_regex(beside, _LABELLED, r"\1labels/")
        has_label = pc.not_equal(label, beside)
        rows = pc.and_(names.is_null(), has_label)
        found = [(self._texts.folder, pc.replace_with_mask(names, rows, self._texts.find(label.filter(rows))))]
        rows = pc.and_(names.is_null(), pc.invert(has_label))
        if self._outer_root is not None and pc.any(rows).as_py():
            # the folder outside may be large, or not ours to read
            outer = _Texts(list_folder(self._outer_root, self._notes))
            none = pa.nulls(len(media), pa.large_string())
            found.append((outer.folder, pc.replace_with_mask(none, rows, outer.find(beside.filter(rows)))))
        return found


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
        self._names = matching(folder.names, r"(?i)\.txt$")
        self._exact: list[pa.Array] = []  # names that were found as they are
        self._alike: dict[str, str] = {}  # others, and as what they were wanted

    def find(self, wanted: pa.Array) -> pa.Array:
        """The name of each caption that is `wanted`, null where it is not there. Raises `DataError` if that is
        ambiguous."""
        is_here = pc.is_in(wanted, self._names)
        found = pc.if_else(is_here, wanted, pa.scalar(None, wanted.type))
        self._exact.append(found.drop_null())
        missing = wanted.filter(pc.invert(is_here))
        # only names that are alike become Python objects
        alike = by_folded(self._names.filter(pc.is_in(_folded(self._names), _folded(missing))).to_pylist())
        if alike:
            names = [self._one_of(alike.get(folded(name), []), name) for name in missing.to_pylist()]
            found = pc.replace_with_mask(found, pc.invert(is_here), pa.array(names, wanted.type))
        taken = pa.array(self._alike, wanted.type)
        for name in (name for exact in self._exact for name in exact.filter(pc.is_in(exact, taken)).to_pylist()):
            self._refuse(name, name)
        return found

    def _one_of(self, alike: list[str], wanted: str) -> str | None:
        if len(alike) > 1:
            raise DataError(
                f"{self.folder.root}: '{wanted}' is not there, and {listed(sorted(alike))} may be meant; give "
                "the file and its caption the same name."
            )
        # x.jpg and X.jpg would share x.txt; x.jpg and x.mp4 may, as they want the same name.
        if alike and self._alike.setdefault(alike[0], wanted) != wanted:
            self._refuse(alike[0], wanted)
        return alike[0] if alike else None

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        raise DataError(
            f"{self.folder.root}: '{name}' may be the caption of two files, as '{wanted}' and as "
            f"'{self._alike[name]}'; give each file a caption of the same name."
        )


def _folded(names: pa.Array) -> pa.Array:
    if pc.all(pc.string_is_ascii(names)).as_py():
        return pc.ascii_lower(names)
    return pa.array((folded(name.as_py()) for name in names), names.type)
