"""A folder of media with captions in text files, beside them or in CogVideo's `labels/`."""

import os
from functools import cached_property

from sat_ext.data.sources.listing import Folder, Notes, list_folder
from sat_ext.data.sources.texts import by_folded, folded, listed, one_line
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

    Raises `DataError` if there is no media, or not a caption for every file.
    """
    captions = _Captions(folder, notes)
    found: dict[str, tuple[Folder, str] | None] = {}
    for name in folder.names:
        if is_media(name):
            found[name] = captions.find(name)
        else:
            notes.leave_out(name)
    bare = sorted(name for name, place in found.items() if place is None)
    if bare and notes.captions_required:
        looked = " and ".join(f"'{c}'" for c in captions.candidates(bare[0]))
        raise DataError(
            f"{folder.root}: {len(bare)} of {len(found)} media files have no caption ({listed(bare)}; looked for "
            f"{looked}); write one text file for each, or list the files in a .jsonl or .csv."
        )
    if not found:
        others = f", but {sum(notes.unread.values())} files ending in {', '.join(sorted(notes.unread))}"
        raise DataError(
            f"{folder.root}: no image or video in this folder or below it{others if notes.unread else ''}; "
            f"known are {' '.join(sorted(_MEDIA))}."
        )
    texts: dict[str, str] = {}
    for where in captions.folders:
        own = {media: place[1] for media, place in found.items() if place and place[0] is where}
        for media, text in zip(own, where.captions(list(own.values()), notes), strict=True):
            texts[media] = one_line(text)
            if not texts[media]:
                notes.add("empty captions, to be trained without one", media)
    return [
        Item(path=folder.location(name), key=name, captions=(texts[name],) if name in texts else ())
        for name in found
    ]


class _Captions:
    """Where the captions of a folder's files are. If it is `videos/` itself, `labels/` lies beside it."""

    def __init__(self, folder: Folder, notes: Notes) -> None:
        self.folders = [folder]
        self._notes = notes
        self._inner = _Texts(folder)
        root = folder.root if is_url(folder.root) else os.path.abspath(folder.root)
        self._outer_root, up = _labels(root, 3 if is_url(root) else 1)
        if self._outer_root is not None:
            notes.reach.add(up or "/", self._outer_root.removeprefix(up + "/"))

    @cached_property
    def _outer(self) -> "_Texts":
        """The folder `labels/` outside, listed only when it is needed."""
        assert self._outer_root is not None
        self.folders.append(list_folder(self._outer_root, self._notes))
        return _Texts(self.folders[-1])

    def find(self, media: str) -> tuple[Folder, str] | None:
        """The folder and the name in it, or None."""
        beside, label = _text_names(media)
        for wanted in (beside, label):
            if wanted is not None and (name := self._inner.find(wanted)):
                return self.folders[0], name
        if label is None and self._outer_root is not None and (name := self._outer.find(beside)):
            return self.folders[1], name
        return None

    def candidates(self, media: str) -> list[str]:
        """Where the caption was looked for, best first."""
        beside, label = _text_names(media)
        found = [self.folders[0].location(name) for name in (beside, label) if name is not None]
        return found + [f"{self._outer_root}/{beside}"] * (label is None and self._outer_root is not None)


def _text_names(media: str) -> tuple[str, str | None]:
    """What a file's caption may be called: beside it, and in `labels/`."""
    beside = os.path.splitext(media)[0] + ".txt"
    return beside, _labels(beside, 0, last=-1)[0]


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
        self._root = folder.root
        self._names = {n for n in folder.names if n.lower().endswith(".txt")}
        self._taken: dict[str, str] = {}

    @cached_property
    def _alike(self) -> dict[str, list[str]]:
        return by_folded(self._names)

    def find(self, wanted: str) -> str | None:
        """The name of the caption `wanted`.

        Raises `DataError` if several may be meant, or if it already belongs to another file.
        """
        name = wanted if wanted in self._names else None
        if name is None:
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
