"""A folder of media with captions in text files, beside them or in CogVideo's `labels/`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from sat_ext.data.sources.listing import Folder, Notes, by_folded, folded, list_folder, listed, one_line
from sat_ext.errors import DataError
from sat_ext.files import is_url
from sat_ext.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Item

# CogVideo's layout: videos/x.mp4 has its caption in labels/x.txt.
_LABELLED_FOLDERS = frozenset({"videos", "images"})

_MEDIA = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS


def is_media(name: str) -> bool:
    """Whether a file's name is that of an image or a video."""
    return os.path.splitext(name)[1].lower() in _MEDIA


def read_sidecars(folder: Folder, notes: Notes) -> list[Item]:
    """Every image and video with its caption: x.txt beside it, or labels/x.txt if it lies in videos/ or images/.

    Raises `DataError` where there is no media, or not a caption for every file.
    """
    captions = _Captions(folder, notes)
    media: list[str] = []
    inner: list[tuple[int, str]] = []
    outer: list[tuple[int, str]] = []
    bare: list[str] = []
    for name in folder.names:
        if not is_media(name):
            notes.leave_out(name)
            continue
        found = captions.find(name)
        if found is None:
            bare.append(name)
            continue
        (inner if found[0] is folder else outer).append((len(media), found[1]))
        media.append(name)
    if bare and notes.captions_required:
        bare.sort()
        looked = " and ".join(f"'{c}'" for c in captions.candidates(bare[0]))
        raise DataError(
            f"{folder.root}: {len(bare)} of {len(media) + len(bare)} media files have no caption "
            f"({listed(bare)}; looked for {looked}); write one text file for each, or list the files in a "
            ".jsonl or .csv."
        )
    if not media and not bare:
        others = f", but {sum(notes.unread.values())} files ending in {', '.join(sorted(notes.unread))}"
        raise DataError(
            f"{folder.root}: no image or video in this folder or below it{others if notes.unread else ''}; "
            f"known are {' '.join(sorted(_MEDIA))}."
        )
    texts = [""] * len(media)
    for place, text in _texts(folder, inner, captions, outer, notes):
        texts[place] = text
        if not text:
            notes.add("empty captions, to be trained without one", media[place])
    return [
        Item(path=folder.location(name), key=name, captions=(text,))
        for name, text in zip(media, texts, strict=True)
    ] + [Item(path=folder.location(name), key=name, captions=()) for name in bare]


def _texts(
    folder: Folder,
    inner: list[tuple[int, str]],
    captions: _Captions,
    outer: list[tuple[int, str]],
    notes: Notes,
) -> Iterator[tuple[int, str]]:
    for where, wanted in ((folder, inner), (captions.labels(), outer)):
        if wanted:
            names = [name for _, name in wanted]
            for (place, _), text in zip(wanted, where.texts(names, notes), strict=True):
                yield place, one_line(text)


class _Captions:
    """Where captions of a folder's files are. Of a folder that is `videos/` itself, `labels/` lies beside it."""

    def __init__(self, folder: Folder, notes: Notes) -> None:
        self._folder, self._notes = folder, notes
        self._names = _Texts(folder)
        self._outer: Folder | None = None
        self._outer_names = _Texts(Folder("", []))
        root = folder.root if is_url(folder.root) else os.path.abspath(folder.root)
        parts = root.split("/")
        self._outer_root: str | None = None
        for i in reversed(range(3 if is_url(root) else 1, len(parts))):
            if parts[i].lower() in _LABELLED_FOLDERS:
                self._outer_root = "/".join((*parts[:i], "labels", *parts[i + 1 :]))
                notes.reach.add("/".join(parts[:i]) or "/", "labels", *parts[i + 1 :])
                break

    def labels(self) -> Folder:
        """The folder `labels/` outside, listed once."""
        if self._outer is None:
            root = self._outer_root
            self._outer = list_folder(root, self._notes) if root else Folder("", [])
            self._outer_names = _Texts(self._outer)
        return self._outer

    def find(self, media: str) -> tuple[Folder, str] | None:
        """The folder and the name in it, or None."""
        beside, label = self._inside(media)
        for wanted in (beside, label):
            if wanted is not None and (name := self._names.find(wanted)):
                return self._folder, name
        if label is None and self._outer_root is not None:
            labels = self.labels()
            if name := self._outer_names.find(beside):
                return labels, name
        return None

    def candidates(self, media: str) -> list[str]:
        """Where the caption was looked for, best first."""
        beside, label = self._inside(media)
        found = [self._folder.location(name) for name in (beside, label) if name is not None]
        return found + [f"{self._outer_root}/{beside}"] * (label is None and self._outer_root is not None)

    @staticmethod
    def _inside(media: str) -> tuple[str, str | None]:
        beside = os.path.splitext(media)[0] + ".txt"
        parts = beside.split("/")
        for i in reversed(range(len(parts) - 1)):
            if parts[i].lower() in _LABELLED_FOLDERS:
                return beside, "/".join((*parts[:i], "labels", *parts[i + 1 :]))
        return beside, None


class _Texts:
    """The text files of a folder, found by their names or, where those differ, whatever their case and accents."""

    def __init__(self, folder: Folder) -> None:
        self._root = folder.root
        self._names = {n for n in folder.names if n.lower().endswith(".txt")}
        self._alike: dict[str, list[str]] | None = None
        self._taken: dict[str, str] = {}

    def find(self, wanted: str) -> str | None:
        """The name of the caption that should be called `wanted`.

        Raises `DataError` where several may be meant, or where the one is already another file's.
        """
        name = wanted if wanted in self._names else None
        if name is None:
            self._alike = by_folded(self._names) if self._alike is None else self._alike
            alike = self._alike.get(folded(wanted), [])
            if len(alike) > 1:
                raise DataError(
                    f"{self._root}: '{wanted}' is not there, and {listed(sorted(alike))} may be meant; give the "
                    "file and its caption the same name."
                )
            name = alike[0] if alike else None
        if name is not None and self._taken.setdefault(name, wanted) != wanted:
            raise DataError(
                f"{self._root}: '{name}' may be the caption of two files, as '{wanted}' and as "
                f"'{self._taken[name]}'; give each file a caption of the same name."
            )
        return name
