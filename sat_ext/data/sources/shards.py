"""WebDataset shards: tars whose members belong together by name. Only headers and captions are read.

Nothing is unpacked, and nothing but media, text and JSON is looked at: a `.pyd` or `.pth` member stays closed.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from typing_extensions import Self

from sat_ext.data.columns import ITEM_COLUMNS, item_batches
from sat_ext.data.sources import kept
from sat_ext.data.sources.listing import Notes, is_media
from sat_ext.data.sources.rows import CAPTION_COLUMNS, fields_of
from sat_ext.data.sources.texts import (
    MAX_CAPTION_BYTES,
    by_folded,
    folded,
    is_text,
    listed,
    objects_of,
    one_line,
    parse_json,
)
from sat_ext.errors import DataError, MediaError, SatExtError
from sat_ext.files import fingerprint, is_url, open_binary, suffix_of
from sat_ext.files.locations import member_location
from sat_ext.files.ranged import filesystem
from sat_ext.types import IMAGE_EXTENSIONS, Item

_VERSION = 1  # raise it when a tar is read in another way than before
_AT_ONCE = 8  # shards; behind a URL, reading one is mostly waiting
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_LARGEST_EXTENSION = 32 << 10  # bytes of a header's extension (a long name); parsing is slow beyond
_EXTENSIONS = (b"x", b"g", b"X", tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
# What `tarfile` raises for an invalid header; the end of a tar is another error.
_MALFORMED = (
    *(tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError),  # type: ignore[attr-defined]
    *(ValueError, LookupError, RecursionError),
)
_RESERVED = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members


@dataclass(slots=True)
class _Sample:
    """What belongs together: media (name: offset, size), and the fields that `.txt` and `.json` give."""

    media: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_shards(shards: Sequence[tuple[str, str]], notes: Notes) -> list[pa.RecordBatch]:
    """The samples of tars, each given as its location and the start of its samples' keys.

    A sample is a clip or a still with its `.txt` or `.json`, by WebDataset's rule: names are equal up to the first
    dot. Of several media of one name, clips win. `.json` holds the fields of a table's row. SAT's
    `0000.meta.jsonl` beside `0000.tar` adds fields to the samples that its `key`s name, and wins.

    A sample without a caption is left out and noted. Raises `DataError` for a file that is not a tar, for a member
    whose path is absolute or leads upwards, and if no sample is left.
    """
    with ThreadPoolExecutor(min(_AT_ONCE, len(shards))) as pool:
        found = pool.map(lambda shard: _batches(shard[0], shard[1], notes), shards)
        batches = [batch for part in found for batch in part]
    if not batches:
        raise DataError(
            f"{listed([tar for tar, _ in shards])}: no image or video with a caption; a sample is x.mp4 or x.jpg "
            "with x.txt or x.json."
        )
    return batches


def _batches(tar: str, prefix: str, notes: Notes) -> list[pa.RecordBatch]:
    """The samples of a tar: as an earlier run has kept them or, if that found anything odd, from its headers."""
    place, state = kept.place_of("tars", f"{tar}\n{prefix}"), ""
    files = [tar, *(path for path in _meta_paths(tar) if _exists(path))]
    with suppress(MediaError):  # of the tar, which reading it reports
        state = "\n".join([str(_VERSION), *(f"{file} {fingerprint(file)}" for file in files)])
    for meta in files[1:]:
        notes.reach.check(meta, tar)
    if state and (table := kept.load(place, ITEM_COLUMNS, state)) is not None:
        return table.to_batches()
    own = Notes(captions_required=notes.captions_required, reach=notes.reach)
    try:
        batches = list(item_batches(_read_shard(tar, prefix, own)))
    finally:
        was_odd = notes.take(own)
    if batches and state and notes.captions_required and not was_odd:
        kept.save(place, pa.Table.from_batches(batches), state)
    return batches


def _read_shard(tar: str, prefix: str, notes: Notes) -> Iterator[Item]:
    samples = _samples(tar, notes)
    extra = _meta_rows(tar, notes)
    for key, sample in samples.items():
        row = sample.rows.get(".json", {}) | sample.rows.get(".txt", {})
        added = extra.get(_webdataset_key(key), {})
        if any(added.get(name) is not None for name in CAPTION_COLUMNS):
            row = {k: v for k, v in row.items() if k not in (*CAPTION_COLUMNS, "captions", "caption_weights")}
        fields = fields_of(row | added, f"{tar}, sample {key}")
        if not fields["captions"] and notes.captions_required:
            notes.add("samples without a caption, left out", f"{prefix}/{key}")
            continue
        name = min(sample.media, key=lambda n: (suffix_of(n) in IMAGE_EXTENSIONS, len(n), n))
        yield Item(path=member_location(tar, name, *sample.media[name]), key=f"{prefix}/{key}", **fields)


def _webdataset_key(name: str) -> str:
    """A name up to the first dot after its last slash."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _samples(tar: str, notes: Notes) -> dict[str, _Sample]:
    """Samples with media by key, in the order of the tar.

    If names hold more dots, `a.b.mp4` goes with `a.b.txt`. Without that file it goes by WebDataset's key, and is
    left out if plainer media have that key: `a.seg.png` beside `a.jpg` is an annotation. A caption whose name
    differs in case or accents counts only if there is no other.
    """
    by_stem: dict[str, _Sample] = {}
    for name, offset, size, data in _members(tar, notes):
        stem, suffix = os.path.splitext(name.removeprefix("./"))
        sample = by_stem.setdefault(stem, _Sample())
        if data is None:
            sample.media[name] = offset, size  # of two of one name, a tar means the last
        elif suffix.lower() == ".txt":
            sample.rows[".txt"] = {"caption": one_line(notes.decode(data, f"{tar}#{name}"))}
        elif (row := _object(data, f"{tar}#{name}", notes)) is not None:
            sample.rows[".json"] = row
    found: dict[str, _Sample] = {}
    alike: dict[str, list[str]] = {}
    for stem, sample in by_stem.items():
        key = _webdataset_key(stem)
        plain = by_stem.get(key, _Sample())
        if not sample.media or (stem != key and not sample.rows and plain.media):
            continue
        sample.rows = sample.rows or plain.rows
        if not sample.rows:
            alike = alike or by_folded(by_stem)
            same = alike[folded(stem)]
            names = [name for name in same if not by_stem[name].media]
            if names and len(same) > 2:
                raise DataError(
                    f"{tar}: {listed(sorted(same))} may belong together in several ways; give each file and its "
                    "caption the same name."
                )
            for name in names:
                sample.rows = by_stem[name].rows
        found[stem] = sample
    return found


def _object(data: bytes, name: str, notes: Notes) -> dict[str, Any] | None:
    try:
        row = parse_json(data) if len(data) <= MAX_CAPTION_BYTES else None
    except ValueError:
        row = None
    if not isinstance(row, dict):
        notes.add(".json members that are not JSON objects, left out", name)
        return None
    return row


def _members(tar: str, notes: Notes) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Name, offset and size of each member that is media, text or JSON, with the data of text and JSON."""
    try:
        with open_binary(tar) as file:
            if file.read(6).startswith(_COMPRESSED):
                raise DataError(f"{tar}: it is compressed, so members cannot be read one by one; decompress it.")
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
                while (member := _next(archive, end, tar, notes)) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # they would add up to gigabytes
                    if (kind := _kind(member, tar, notes)) is None:
                        continue
                    if member.offset_data + member.size > end:
                        notes.add("tars that end before their last member does, which is left out", tar)
                        return
                    data = None
                    if kind == "text":
                        file.seek(member.offset_data)
                        data = file.read(min(member.size, MAX_CAPTION_BYTES + 1))
                    yield member.name, member.offset_data, member.size, data
    except tarfile.TarError as error:
        raise DataError(f"{tar}: not a readable tar ({error}); write it again.") from error
    except MediaError as error:
        raise DataError(f"{tar}: {error.reason}; check sources or train_data.") from error


class _Header(tarfile.TarInfo):
    """A member's header. An invalid one is an error; with Python's own class, the tar ends, crashes or loops."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """From 512 bytes. Refuses sizes that would be read at once, or that lead backwards."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENSIONS and header.size > _LARGEST_EXTENSION):
            raise tarfile.ReadError(f"a header of type {header.type!r} says {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """The next one, with its extensions. Raises `ReadError` whatever is wrong with it."""
        try:
            header = super().fromtarfile(archive)
        except SatExtError:  # of reading the file
            raise
        except _MALFORMED as error:
            raise tarfile.ReadError(str(error) or type(error).__name__) from error
        if archive.offset <= header.offset:
            raise tarfile.ReadError(f"a header says {header.size} bytes")
        return header


def _next(archive: tarfile.TarFile, end: int, tar: str, notes: Notes) -> tarfile.TarInfo | None:
    try:
        is_first = archive.firstmember is not None  # type: ignore[attr-defined]
        # A header's size may lead further than any file can seek.
        if not is_first and archive.offset > end:
            raise tarfile.ReadError("unexpected end of data")
        return archive.next()
    except tarfile.TarError as error:
        notes.add(f"damaged tars, read up to the damage ({error})", tar)
        return None


def _kind(member: tarfile.TarInfo, tar: str, notes: Notes) -> str | None:
    """'media', 'text', or None for what is left out. Raises `DataError` for a path that leads out of the tar."""
    name = member.name
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:[/\\]", name):
        raise DataError(
            f"{tar}: its member '{name}' has a path that is absolute or leads upwards, as in a malicious tar; "
            "write it again with relative names."
        )
    if _RESERVED.match(name) or os.path.basename(name).startswith(".") or member.isdir():
        return None
    text = name.lower().endswith((".txt", ".json"))
    if not text and not is_media(name):
        if member.isreg():
            notes.leave_out(f"{tar}#{name}")
        return None
    if not member.isreg() or member.issparse():
        notes.add("links and other members that are not plain files, left out", f"{tar}#{name}")
        return None
    if not is_text(name):
        notes.add("members left out for their names, which are not UTF-8", repr(name))
        return None
    return "text" if text else "media"


def _meta_rows(tar: str, notes: Notes) -> dict[str, dict[str, Any]]:
    """The rows of SAT's `.meta.jsonl` beside a tar, by key, if there are any."""
    path = next((p for p in _meta_paths(tar) if _exists(p)), None)
    if path is None:
        return {}
    notes.reach.check(path, tar)
    rows: dict[str, dict[str, Any]] = {}
    example = '{"key": "0001", "caption": "A cat."}'
    for place, row in objects_of(path, example):
        if "key" not in row:
            raise DataError(f"{path}, {place}: it has no 'key'; write lines such as {example}.")
        rows.setdefault(str(row["key"]).removeprefix("./"), {}).update(row)
    return rows


def _meta_paths(tar: str) -> list[str]:
    """`0000.meta.jsonl` for `0000.tar`; of a name with several dots SAT takes the part before the first one."""
    if "?" in tar and is_url(tar):
        return []  # a signed address holds for one file only
    folder, slash, file = tar.rpartition("/")
    names = dict.fromkeys((os.path.splitext(file)[0], file.partition(".")[0]))
    return [f"{folder}{slash}{name}.meta.jsonl" for name in names]


def _exists(path: str) -> bool:
    if not is_url(path):
        return os.path.isfile(path)
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))
