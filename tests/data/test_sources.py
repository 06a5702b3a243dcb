from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from sat_ext.data.sources import SourceConfig, listing, read_source
from sat_ext.errors import ConfigError, DataError


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def pair(folder: Path, name: str, caption: str = "a caption") -> None:
    put(folder / name)
    put((folder / name).with_suffix(".txt"), caption)


def test_a_folder_gives_every_file_with_its_caption_in_natural_order(tmp_path):
    for name in ("clip10.mp4", "clip2.mp4", "deep/er/still.JPG", "clip1.webm"):
        pair(tmp_path, name, f"caption of {name}")
    items = read_source(str(tmp_path))
    assert [i.key for i in items] == ["clip1.webm", "clip2.mp4", "clip10.mp4", "deep/er/still.JPG"]
    assert [i.captions[0] for i in items] == [f"caption of {i.key}" for i in items]
    assert all(Path(i.path) == tmp_path / i.key for i in items)


def test_names_with_spaces_and_unicode_are_read(tmp_path):
    for name in ("my clip, 1.mp4", "größe/猫 の 動画.mp4", "emoji 🐈.png"):
        pair(tmp_path, name, name)
    assert {i.key: i.captions[0] for i in read_source(str(tmp_path))} == {
        name: name for name in ("my clip, 1.mp4", "größe/猫 の 動画.mp4", "emoji 🐈.png")
    }


def test_a_caption_file_is_joined_to_one_line_and_loses_its_byte_order_mark(tmp_path):
    put(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes("\ufeff  A cat \r\n\r\n on a mat.\n".encode())
    assert read_source(str(tmp_path))[0].captions[0] == "A cat on a mat."


@pytest.mark.parametrize("folder", ["videos", "images"])
def test_captions_may_lie_in_labels_beside_videos_or_images(tmp_path, folder):
    put(tmp_path / folder / "deep" / "1.mp4")
    put(tmp_path / "labels" / "deep" / "1.txt", "from labels")
    for root in (tmp_path, tmp_path / folder):
        assert [i.captions[0] for i in read_source(str(root))] == ["from labels"]


def test_a_sidecar_wins_over_labels(tmp_path):
    pair(tmp_path, "videos/1.mp4", "beside")
    put(tmp_path / "labels" / "1.txt", "from labels")
    assert read_source(str(tmp_path))[0].captions[0] == "beside"


def test_hidden_files_and_other_files_are_left_out(tmp_path):
    pair(tmp_path, "a.mp4")
    put(tmp_path / "._a.mp4")
    put(tmp_path / ".cache" / "b.mp4")
    put(tmp_path / "notes.md")
    assert [i.key for i in read_source(str(tmp_path))] == ["a.mp4"]


def test_links_are_followed_and_loops_of_links_end(tmp_path):
    pair(tmp_path / "elsewhere", "b.mp4")
    pair(tmp_path / "set", "sub/a.mp4")
    os.symlink(tmp_path / "set", tmp_path / "set" / "sub" / "up")
    os.symlink(tmp_path / "set" / "sub", tmp_path / "set" / "again")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "linked")
    os.symlink("itself", tmp_path / "set" / "itself")
    items = read_source(str(tmp_path / "set"), allowed_roots=[str(tmp_path)])
    assert [Path(i.path).name for i in items] == ["a.mp4", "b.mp4"]


def test_missing_captions_are_counted_named_and_say_where_they_were_looked_for(tmp_path):
    for n in range(5):
        put(tmp_path / "videos" / f"{n}.mp4")
    with pytest.raises(
        DataError, match=r"5 of 5 media files have no caption \('videos/0.mp4', .*'videos/2.mp4', \.\.\."
    ) as e:
        read_source(str(tmp_path))
    assert str(tmp_path / "labels" / "0.txt") in str(e.value) and str(tmp_path / "videos" / "0.txt") in str(
        e.value
    )
    for n in range(4):
        put(tmp_path / "videos" / f"{n}.txt", "here")
    with pytest.raises(DataError, match=r"1 of 5 media files have no caption \('videos/4.mp4'; looked for"):
        read_source(str(tmp_path))


def test_a_folder_without_media_is_an_error_that_lists_what_is_known(tmp_path):
    put(tmp_path / "a.txt", "text")
    with pytest.raises(DataError, match=r"no image or video in this folder or below it; known are .*\.mp4"):
        read_source(str(tmp_path))


def test_a_caption_that_is_not_utf8_is_repaired_and_named(tmp_path, caplog):
    pair(tmp_path, "b.mp4")
    put(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes("a café".encode("latin-1"))
    assert [i.captions for i in read_source(str(tmp_path))] == [("a caf\ufffd",), ("a caption",)]
    assert "captions that are not UTF-8, their bad bytes replaced; save them as UTF-8: 1 ('a.txt')" in caplog.text


def test_captions_are_not_opened_again_before_they_change(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "cache"))
    opened: list[str] = []
    head = listing._head
    monkeypatch.setattr(listing, "_head", lambda path: opened.append(Path(path).name) or head(path))

    def read() -> tuple[list[str], list[str]]:
        opened.clear()
        return [i.captions[0] for i in read_source(str(tmp_path / "set"))], sorted(opened)

    for number in range(3):
        pair(tmp_path / "set", f"{number}.mp4", f"caption {number}")
    captions = ["caption 0", "caption 1", "caption 2"]
    assert read() == (captions, ["0.txt", "1.txt", "2.txt"])
    assert read() == (captions, [])
    pair(tmp_path / "set", "1.mp4", "another")
    pair(tmp_path / "set", "3.mp4", "a new one")
    assert read() == (["caption 0", "another", "caption 2", "a new one"], ["1.txt", "3.txt"])
    status = os.stat(put(tmp_path / "set" / "2.txt", "Caption 2"))
    os.utime(tmp_path / "set" / "2.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert read() == (["caption 0", "another", "Caption 2", "a new one"], ["2.txt"])
    (tmp_path / "set" / "3.mp4").unlink()
    assert read() == (["caption 0", "another", "Caption 2"], [])

    (tmp_path / "set" / "0.txt").write_bytes(b"caf\xe9")  # what is odd is said at every start
    for _ in range(2):
        caplog.clear()
        assert read() == (["caf\ufffd", "another", "Caption 2"], ["0.txt"])
        assert "captions that are not UTF-8" in caplog.text

    for kept in (tmp_path / "cache" / "captions").iterdir():  # damaged, and never beside the data
        kept.write_bytes(kept.read_bytes()[:-100])
    assert read()[1] == ["0.txt", "1.txt", "2.txt"]
    assert {p.name for p in (tmp_path / "set").iterdir()} == {
        f"{n}.{s}" for n in range(3) for s in ("mp4", "txt")
    } | {"3.txt"}

    (tmp_path / "secret").write_bytes(b"another")  # nor does it open what a link leads to
    status = os.stat(tmp_path / "set" / "1.txt")
    os.utime(tmp_path / "secret", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "set" / "1.txt").unlink()
    os.symlink(tmp_path / "secret", tmp_path / "set" / "1.txt")
    with pytest.raises(DataError, match=r"1\.txt leads to .*secret, out of the source's folder"):
        read()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_texts_of_windows_are_read_whatever_their_encoding(tmp_path, encoding):
    def write(path: Path, text: str) -> str:
        path.parent.mkdir(exist_ok=True)
        mark = "\ufeff" if encoding.endswith(("-le", "-be")) else ""
        path.write_bytes((mark + text).encode(encoding))
        return str(path)

    put(tmp_path / "d" / "a.mp4")
    write(tmp_path / "d" / "a.txt", "Ein größeres Café.\r\n")
    write(tmp_path / "p" / "prompts.txt", "Ein größeres Café. \r\nZwei.\r\n")
    write(tmp_path / "p" / "videos.txt", "a.mp4 \r\nb.mp4\r\n")
    csv = write(tmp_path / "t.csv", "path,caption\r\na.mp4,Ein größeres Café.\r\n")
    jsonl = write(tmp_path / "t.jsonl", json.dumps({"path": "a.mp4", "caption": "Ein größeres Café."}) + "\r\n")
    for source in (tmp_path / "d", tmp_path / "p", csv, jsonl):
        first = read_source(str(source))[0]
        assert (first.key, first.captions) == ("a.mp4", ("Ein größeres Café.",))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_without_a_mark_is_refused_by_name(tmp_path, encoding):
    put(tmp_path / "d" / "a.mp4")
    texts = {
        "d/a.txt": "A cat.",
        "t.csv": "path,caption\na.mp4,A cat.\n",
        "t.jsonl": '{"path": "a", "caption": ""}',
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match=rf"{path.name}: it has null bytes, .*; save it as UTF-8\."):
            read_source(str(path.parent if path.suffix == ".txt" else path))


def test_captions_are_found_whatever_their_case_and_accents(tmp_path):
    def decomposed(name: str) -> str:  # as macOS writes it
        return unicodedata.normalize("NFD", name)

    pairs = {
        "IMG_1.JPG": "IMG_1.TXT",
        "Photo.jpg": "photo.txt",
        "café.mp4": decomposed("café.txt"),
        decomposed("größe/Ärger.png"): "GRÖSSE/ärger.Txt",
        "Videos/a.mp4": "Labels/A.txt",
    }
    for media, caption in pairs.items():
        put(tmp_path / media)
        put(tmp_path / caption, f"of {media}")
    items = read_source(str(tmp_path))
    assert {i.key: i.captions for i in items} == {media: (f"of {media}",) for media in pairs}
    assert all(Path(i.path).is_file() for i in items)


def test_captions_that_may_be_of_several_files_are_refused(tmp_path):
    put(tmp_path / "a" / "clip.mp4")
    for name in ("Clip.txt", "CLIP.txt"):
        put(tmp_path / "a" / name, "?")
    with pytest.raises(DataError, match=r"'clip.txt' is not there, and 'CLIP.txt', 'Clip.txt' may be meant; give"):
        read_source(str(tmp_path / "a"))
    put(tmp_path / "a" / "clip.txt", "mine")  # the same name wins
    assert read_source(str(tmp_path / "a"))[0].captions == ("mine",)
    for name in ("x.jpg", "X.jpg", "x.txt"):
        put(tmp_path / "b" / name, "?")
    with pytest.raises(DataError, match=r"'x.txt' may be the caption of two files, as '.\.txt' and as"):
        read_source(str(tmp_path / "b"))
    put(tmp_path / "c" / "x.jpg")
    pair(tmp_path / "c", "x.mp4", "of both")
    assert [i.captions for i in read_source(str(tmp_path / "c"))] == [("of both",)] * 2


def test_files_of_other_endings_are_read_or_counted_and_named(tmp_path, caplog):
    known = [f"{n}{e}" for n, e in enumerate((".jfif", ".3gp", ".ogv", ".apng", ".mxf", ".HEIC", ".JPE", ".vob"))]
    for name in (*known, "a.jxl", "b.jxl", "c.PSD", "d.wtv", "README.md", "x.npy", "LICENSE"):
        pair(tmp_path, name)
    unread: Counter[str] = Counter()
    assert {i.key for i in read_source(str(tmp_path), unread=unread)} == set(known)
    assert unread == {".jxl": 2, ".psd": 1, ".wtv": 1}
    assert (
        "files ending in .jxl are not read and were left out; convert or rename them: 2 ('a.jxl', 'b.jxl')"
        in caplog.text
    )
    assert len(caplog.records) == 3
    for name in known:
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"below it, but 4 files ending in .jxl, .psd, .wtv; known are "):
        read_source(str(tmp_path))


def test_tables_of_windows_and_macos_name_the_files_of_this_disk(tmp_path):
    names = ["videos/sub/a.mp4", unicodedata.normalize("NFD", "café/b.mp4"), "back\\slash.mp4"]
    for name in names:
        put(tmp_path / name)
    written = ["Videos\\sub\\A.mp4", "café/b.mp4", "back\\slash.mp4", " videos/sub/a.mp4 ", "videos\\none.mp4"]
    table = put(tmp_path / "t.jsonl", "".join(json.dumps({"path": n, "caption": "x"}) + "\n" for n in written))
    found = {i.key: os.path.relpath(i.path, tmp_path) for i in read_source(str(table))}
    assert [found[n] for n in written] == [*names, names[0], "videos\\none.mp4"]
    put(tmp_path / "videos" / "SUB" / "a.mp4")
    table.write_text('{"path": "videos\\\\Sub\\\\a.mp4", "caption": "x"}')
    with pytest.raises(DataError, match=r"t.jsonl, line 1: '.*' may be any of '.*; write it as it is"):
        read_source(str(table))


def test_empty_captions_are_kept_and_counted_in_one_warning(tmp_path, caplog):
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"):
        pair(tmp_path, name, " \n" if name < "e" else "full")
    assert [i.captions for i in read_source(str(tmp_path))] == [("",)] * 4 + [("full",)]
    assert len(caplog.records) == 1
    assert "empty captions, to be trained without one: 4 ('a.mp4', 'b.mp4', 'c.mp4', ...)" in caplog.text


def test_captions_of_100_kilobytes_are_kept_and_endless_ones_cut(tmp_path, caplog):
    pair(tmp_path, "a.mp4", "x" * 100_000)
    pair(tmp_path, "b.mp4", "ä" * (1 << 20))
    table = put(tmp_path / "t.csv", "path,caption\na.mp4," + "y" * 200_000 + "\n")
    first, second = read_source(str(tmp_path))
    assert first.captions == ("x" * 100_000,)
    assert second.captions == ("ä" * (1 << 19),) and "captions cut after 1 MiB: 1 ('b.txt')" in caplog.text
    assert read_source(str(table))[0].captions == ("y" * 200_000,)


@pytest.mark.skipif(
    not os.path.supports_unicode_filenames and os.name != "posix", reason="names are bytes on POSIX"
)
def test_names_that_are_not_utf8_are_left_out_and_named(tmp_path, caplog):
    pair(tmp_path, "a.mp4")
    for name in (b"caf\xe9.mp4", b"caf\xe9.txt"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_text("x")
    assert [i.key for i in read_source(str(tmp_path))] == ["a.mp4"]
    assert "files left out for their names, which are not UTF-8: 2" in caplog.text


def test_names_with_line_breaks_and_hashes_are_read(tmp_path):
    for name in ("new\nline.mp4", "a#b@1+2.png", "100%.mp4", "-dash.mp4", "q?.mp4"):
        pair(tmp_path, name, name.replace("\n", " "))
    items = read_source(str(tmp_path))
    assert {i.key: i.captions[0] for i in items} == {i.key: i.key.replace("\n", " ") for i in items}
    assert len(items) == 5 and all(Path(i.path).is_file() for i in items)


def test_what_is_no_source_says_what_would_be(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder; check sources or train_data"):
        read_source(str(tmp_path / "nowhere"))
    put(tmp_path / "a.xlsx")
    with pytest.raises(
        DataError,
        match=r"'\.xlsx' is not a kind of source; give a folder, a table \.jsonl or \.csv or \.parquet, or \.tar",
    ):
        read_source(str(tmp_path / "a.xlsx"))


@pytest.mark.parametrize("path_column", ["path", "file", "video", "image", "file_name"])
@pytest.mark.parametrize("caption_column", ["caption", "text", "prompt"])
def test_jsonl_rows_are_read_under_every_accepted_name(tmp_path, path_column, caption_column):
    rows = [{path_column: f"sub/{n}.mp4", caption_column: f"number {n}", "more": n} for n in (10, 9)]
    table = put(tmp_path / "t.jsonl", "\n\n".join(json.dumps(r) for r in rows) + "\n")
    items = read_source(str(table))
    assert [(i.key, i.captions[0]) for i in items] == [("sub/9.mp4", "number 9"), ("sub/10.mp4", "number 10")]
    assert items[0].path == str(tmp_path / "sub" / "9.mp4")


def test_a_table_may_name_absolute_paths_and_one_file_twice(tmp_path):
    rows = [{"path": "/data/a.mp4", "caption": c} for c in ("one", "two")]
    table = str(put(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows))))
    items = read_source(table, allowed_roots=["/data"])
    assert [(i.path, i.key, i.captions[0]) for i in items] == [
        ("/data/a.mp4", "/data/a.mp4", "one"),
        ("/data/a.mp4", "/data/a.mp4#2", "two"),
    ]


def test_csv_with_a_byte_order_mark_quotes_and_line_breaks_is_read(tmp_path):
    table = tmp_path / "t.csv"
    text = 'path, caption\r\nb 2.mp4,"A cat, a ""big"" one,\r\non a mat"\r\na.mp4,größer\r\n'
    table.write_bytes(("\ufeff" + text).encode())
    assert [(i.key, i.captions[0]) for i in read_source(str(table))] == [
        ("a.mp4", "größer"),
        ("b 2.mp4", 'A cat, a "big" one, on a mat'),
    ]


def test_a_missing_column_names_those_there_are_and_those_accepted(tmp_path):
    table = put(tmp_path / "t.csv", "clip,caption\na.mp4,x\n")
    with pytest.raises(
        DataError, match=r"no path column among 'clip', 'caption'; name one of them 'path' or 'file' or"
    ):
        read_source(str(table))
    table = put(tmp_path / "t.jsonl", '{"path": "a.mp4", "caption": "x"}\n{"path": "b.mp4", "label": "x"}\n')
    with pytest.raises(
        DataError, match=r"t\.jsonl, line 2: no caption column among 'path', 'label'; name one of them 'capt"
    ):
        read_source(str(table))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"path": "a.mp4"',
            r"a\.jsonl, line 1: not JSON \(.*\); write one object a line, such as",
        ),
        ("a.jsonl", '["a.mp4"]', r"line 1: a JSON list; write one object a line"),
        (
            "a.jsonl",
            '{"path": 3, "caption": "x"}',
            r"line 1: 'path' is 3; it must be the path of a media file",
        ),
        ("a.jsonl", '{"path": "", "caption": "x"}', r"line 1: 'path' is ''; it must be the path"),
        ("a.jsonl", '{"path": "a", "caption": 3}', r"line 1: the caption is 3; it must be a string"),
        (
            "a.jsonl",
            '{"path": "a", "caption": null}',
            r"1 of 1 rows have no caption \(line 1\); fill them in",
        ),
        ("a.jsonl", "\n", r"a\.jsonl: no rows; every row names one media file"),
        ("a.csv", "", r"a\.csv: no rows"),
        ("a.csv", "path,caption\n", r"a\.csv: no rows"),
        ("a.csv", "path,caption\na.mp4\nb.mp4,x\n", r"1 of 2 rows have no caption \(line 2\)"),
        (
            "a.csv",
            "path,caption\na.mp4,a cat, a mat\n",
            r"line 2: 3 cells under 2 columns; put quotes around",
        ),
        ("a.csv", 'path,caption\na.mp4,"a cat\n', r"not CSV \(.*\); fix the quotes"),
    ],
)
def test_a_table_that_cannot_be_used_says_where_and_why(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_source(str(put(tmp_path / name, text)))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_table_that_is_not_utf8_says_so(tmp_path, name):
    (tmp_path / name).write_bytes('path,caption\na.mp4,"café"\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(.*\); save the table as UTF-8|not JSON"):
        read_source(str(tmp_path / name))


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf")])
def test_a_share_must_be_a_positive_number(share):
    with pytest.raises(ConfigError, match="of 'clips' must be a number above 0"):
        SourceConfig(path="clips", share=share)


def test_a_source_needs_a_path():
    with pytest.raises(ConfigError, match="a path is empty"):
        SourceConfig(path="")
    assert SourceConfig(path="clips", share=0.5).sampler == "random_start"


def test_a_source_without_a_path_is_not_the_folder_of_the_process():
    with pytest.raises(DataError, match="a path is empty"):
        read_source("")
