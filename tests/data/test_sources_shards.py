from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sat_ext.data.probe import probe
from sat_ext.data.sources import read_source, shards
from sat_ext.errors import DataError
from sat_ext.files import open_binary
from tests.media import pattern, read_still, write_clip


def png(index: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pattern(index)).save(out, "png")
    return out.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes | str]], kind: int = tarfile.GNU_FORMAT) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_members_of_one_name_and_can_be_opened_where_they_lie(tmp_path, kind):
    clip = write_clip(tmp_path / "c.mp4")
    long = "deep/" + "ä" * 90 + "/002"
    members = [
        ("001.mp4", clip.read_bytes()),
        ("001.txt", "A clip."),
        (f"{long}.json", json.dumps({"caption": "A still.", "weight": 2, "id": 1})),
        (f"{long}.PNG", png(7)),
    ]
    first, second = read_source(write_tar(tmp_path / "s.tar", members, kind))
    assert (first.key, first.captions, first.weight) == ("s.tar/001", ("A clip.",), 1.0)
    assert (second.key, second.captions, second.weight) == (f"s.tar/{long}", ("A still.",), 2.0)
    assert probe(first.path) == probe(str(clip))
    assert np.array_equal(read_still(second.path)[0], pattern(7))


def test_shards_come_as_a_brace_range_and_as_a_folder(tmp_path):
    for n in range(12):
        write_tar(tmp_path / "shards" / f"{n:04}.tar", [("a.png", png(n)), ("a.txt", f"number {n}")])
    ranged = read_source(f"{tmp_path}/shards/{{0000..0011}}.tar")
    assert [(i.key, i.captions[0]) for i in ranged] == [(f"{n:04}.tar/a", f"number {n}") for n in range(12)]
    assert read_source(str(tmp_path / "shards")) == ranged
    assert [i.captions[0] for i in read_source(f"{tmp_path}/shards/000{{3,1}}.tar")] == ["number 1", "number 3"]


def test_a_range_with_missing_files_names_them(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(0)), ("a.txt", "x")])
    with pytest.raises(
        DataError, match=r"\{0\.\.2\}\.tar: 2 of its 3 files are missing \('.*1\.tar', '.*2\.tar'\)"
    ):
        read_source(f"{tmp_path}/{{0..2}}.tar")


def test_a_range_of_something_else_says_what_it_may_be(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"'\.mp4' is not a kind of source; give a folder, a table .*, or \.tar"):
        read_source(f"{tmp_path}/{{a,b}}.mp4")


def test_tables_come_as_a_range_too(tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps({"path": "a.mp4", "caption": str(n)}))
    assert [i.key for i in read_source(f"{tmp_path}/{{0,1}}.jsonl")] == ["0.jsonl/a.mp4", "1.jsonl/a.mp4"]


def test_sats_meta_lines_add_to_the_samples_that_they_name(tmp_path):
    members = [("1.id", "1"), ("1.png", png(1)), ("1.txt", "old"), ("d/2.png", png(2)), ("d/2.txt", "kept")]
    tar = write_tar(tmp_path / "0000.tar", members)
    lines = [{"key": "1", "caption": "new", "aesthetics": 5}, {"key": "d/2", "weight": 3}, {"key": "9"}]
    (tmp_path / "0000.meta.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(i.captions, i.weight) for i in read_source(tar)] == [(("new",), 1.0), (("kept",), 3.0)]
    (tmp_path / "0000.meta.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"0000\.meta\.jsonl, line 1: it has no 'key'"):
        read_source(tar)


def test_lists_of_captions_in_json_win_over_text(tmp_path):
    row = {"captions": ["a", "b"], "caption_weights": [1, 3], "start": 1.0}
    members = [("1.mp4", b"x"), ("1.txt", "text"), ("1.json", json.dumps(row)), ("2.mp4", b"x")]
    members += [("2.json", json.dumps({"caption": "json"})), ("2.txt", "text")]
    first, second = read_source(write_tar(tmp_path / "s.tar", members))
    assert (first.captions, first.caption_weights, first.start) == (("a", "b"), (1.0, 3.0), 1.0)
    assert second.captions == ("text",)


def test_names_with_several_dots_and_several_media(tmp_path):
    members = [
        *[("a.jpg", b"still"), ("a.mp4", b"clip"), ("a.txt", "clips win")],
        *[("b.jpg", b"plain"), ("b.seg.png", b"annotation"), ("b.txt", "plain ones win")],
        *[("c.v1.mp4", b"x"), ("c.v1.txt", "one"), ("c.v2.mp4", b"x"), ("c.v2.txt", "two")],
        *[("d.large.jpg", b"x"), ("d.txt", "by the first dot")],
        *[("./e.jpg", b"first"), ("./e.jpg", b"replaced"), ("./e.txt", "the last one counts")],
    ]
    items = read_source(write_tar(tmp_path / "s.tar", members))
    assert [(i.key, i.captions[0]) for i in items] == [
        ("s.tar/a", "clips win"),
        ("s.tar/b", "plain ones win"),
        ("s.tar/c.v1", "one"),
        ("s.tar/c.v2", "two"),
        ("s.tar/d.large", "by the first dot"),
        ("s.tar/e", "the last one counts"),
    ]
    contents = []
    for item in items:
        with open_binary(item.path) as file:
            contents.append(file.read())
    assert contents == [b"clip", b"plain", b"x", b"x", b"x", b"replaced"]


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.txt", "..\\a.png", "C:\\a.png", "/a.py"])
def test_a_member_that_leads_out_of_the_tar_is_refused(tmp_path, name):
    tar = write_tar(tmp_path / "s.tar", [("1.png", png(1)), ("1.txt", "x"), (name, b"x")])
    with pytest.raises(DataError, match=r"its member '.*' has a path that is absolute or leads upwards"):
        read_source(tar)


def test_links_are_left_out_and_code_is_not_looked_at(tmp_path, caplog):
    tar = write_tar(tmp_path / "s.tar", [("1.png", png(1)), ("1.txt", "x"), ("1.pyd", b"!"), ("1.pth", b"!")])
    with tarfile.open(tar, "a") as archive:
        for name, kind in (("2.png", tarfile.SYMTYPE), ("3.png", tarfile.LNKTYPE), ("4.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert [i.key for i in read_source(tar)] == ["s.tar/1"]
    assert "links and other members that are not plain files, left out: 3" in caplog.text


def test_what_cannot_be_used_of_a_tar_is_left_out_and_counted(tmp_path, caplog):
    members = [
        *[("1.png", png(1)), ("1.txt", "fine")],
        ("2.png", png(2)),
        *[("3.png", png(3)), ("3.json", "{not json")],
        *[("4.png", png(4)), ("4.txt", "")],
        *[("5.png", png(5)), ("5.txt", "caf\xe9".encode("latin-1"))],
        *[("._1.png", b"mac"), ("__meta__/x.png", b"x")],
    ]
    items = read_source(write_tar(tmp_path / "s.tar", members))
    assert [i.captions[0] for i in items] == ["fine", "", "caf\ufffd"]
    for text in (
        "samples without a caption, left out: 2 ('s.tar/2', 's.tar/3')",
        ".json members that are not JSON objects, left out: 1",
        "empty captions, to be trained without one: 1 ('s.tar/4')",
        "captions that are not UTF-8, their bad bytes replaced; save them as UTF-8: 1",
    ):
        assert text in caplog.text


def test_a_tar_that_was_cut_gives_what_is_whole(tmp_path, caplog):
    tar = Path(
        write_tar(tmp_path / "s.tar", [("1.txt", "x"), ("1.png", png(1)), ("2.txt", "y"), ("2.png", png(2))])
    )
    whole = read_source(str(tar))
    offset = int(whole[1].path.rpartition("@")[2].partition("+")[0])
    tar.write_bytes(tar.read_bytes()[: offset + 40])
    assert [i.key for i in read_source(str(tar))] == ["s.tar/1"]
    assert "tars that end before their last member does" in caplog.text


def test_what_is_no_tar_says_so(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing like a tar" * 100)
    with pytest.raises(DataError, match=r"a\.tar: not a readable tar \(.*\); write it again"):
        read_source(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "b.tar", "w:gz") as archive:
        archive.add(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"b\.tar: it is compressed, so members cannot be read one by one; decomp"):
        read_source(str(tmp_path / "b.tar"))
    (tmp_path / "c.tar").touch()
    with pytest.raises(DataError, match=r"c\.tar: the file is empty"):
        read_source(str(tmp_path / "c.tar"))
    with pytest.raises(
        DataError, match=r"d\.tar': no image or video with a caption; a sample is x\.mp4 or x\.jpg with"
    ):
        read_source(write_tar(tmp_path / "d.tar", [("1.txt", "x")]))


def header(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    """One block; the size in base 256, which can be negative, as no tool writes it."""
    block = bytearray(512)
    block[: len(name)], block[156:157], block[257:265] = name, kind, b"ustar\x0000"
    block[124:136] = b"\xff\xff\xff\xff" + size.to_bytes(8, "big", signed=True) if size < 0 else b"%011o\0" % size
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(field: str) -> bytes:
    text = f"{len(field) + 4} {field}\n".encode()
    return header(b"pax", len(text), b"x") + text.ljust(512, b"\0")


MALFORMED = {
    "a size that leads back": header(b"b.png", -512),
    "a long name that is endless": header(b"b.png", 8**11 - 1, b"L"),
    "a long name of less than nothing": header(b"b.png", -1536, b"L"),
    "a further size that leads back": pax("size=-5000") + header(b"b.png", 5) + bytes(512),
    "holes without places": pax("GNU.sparse.map=a,b,c") + header(b"b.png", 5) + bytes(512),
    "a header about a header about a header": header(b"b", 0, b"x") * 2000,
    "noise": b"noise" * 500,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_tar_is_read_up_to_a_header_that_makes_no_sense(tmp_path, caplog, what):
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", "x")])
    whole = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")
    (tmp_path / "0.tar").write_bytes(
        whole.ljust(-(-len(whole) // 512) * 512, b"\0") + MALFORMED[what] + bytes(1024)
    )
    assert [i.key for i in read_source(str(tmp_path / "0.tar"))] == ["0.tar/a"]
    assert "damaged tars, read up to the damage" in caplog.text
    (tmp_path / "1.tar").write_bytes(MALFORMED[what] + bytes(1024))
    with pytest.raises(DataError, match=r"1\.tar: not a readable tar \(.*\); write it again"):
        read_source(str(tmp_path / "1.tar"))


def test_why_a_tar_has_no_samples_is_logged_before_the_error(tmp_path, caplog):
    path = Path(write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", "x")]))
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(DataError, match="no image or video with a caption"):
        read_source(str(path))
    assert "tars that end before their last member does" in caplog.text


def test_members_of_one_name_in_another_case_or_with_other_accents_belong_together(tmp_path, caplog):
    members = [("Photo.png", png(1)), ("PHOTO.TXT", "one"), ("cafe\u0301.png", png(2)), ("café.txt", "two")]
    members += [("3.png", png(3)), ("3.txt", "drei ü".encode("utf-16")), ("4.jxl", b"x"), ("4.txt", "?")]
    items = read_source(write_tar(tmp_path / "s.tar", members))
    assert sorted(i.captions[0] for i in items) == ["drei ü", "one", "two"]
    assert "files ending in .jxl are not read and were left out; convert or rename them: 1" in caplog.text
    with pytest.raises(DataError, match=r"t.tar: 'AÉ', 'Aé', 'aé' may belong together in"):
        read_source(write_tar(tmp_path / "t.tar", [("aé.png", png(1)), ("AÉ.txt", "1"), ("Aé.txt", "2")]))


def test_the_headers_of_a_tar_are_read_once_as_long_as_it_and_its_meta_lines_stay(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "cache"))
    read: list[str] = []
    members = shards._members
    monkeypatch.setattr(
        shards, "_members", lambda tar, notes: (read.append(Path(tar).name), members(tar, notes))[1]
    )
    folder = tmp_path / "data"
    for n in range(3):
        write_tar(
            folder / f"{n}.tar", [("1.png", png(n)), ("1.txt", f"number {n}"), ("2.png", png(n)), ("2.txt", "")]
        )
    write_tar(folder / "3.tar", [("1.png", png(1)), ("1.txt", "x"), ("2.png", png(2))])
    first = read_source(str(folder))
    said = list(caplog.messages)
    assert sorted(read) == ["0.tar", "1.tar", "2.tar", "3.tar"] and len(said) == 2
    read.clear(), caplog.clear()
    assert read_source(str(folder)) == first
    assert read == ["3.tar"]  # as one of its samples has no caption, which is to be said at every start
    assert caplog.messages == said
    write_tar(folder / "0.tar", [("3.png", png(3)), ("3.txt", "new")])
    (folder / "1.meta.jsonl").write_text('{"key": "1", "caption": "better"}\n')
    read.clear()
    again = {item.key: item.captions for item in read_source(str(folder))}
    assert sorted(read) == ["0.tar", "1.tar", "3.tar"]
    assert again["0.tar/3"] == ("new",) and again["1.tar/1"] == ("better",) and "0.tar/1" not in again
    for kept in (tmp_path / "cache" / "tars").iterdir():
        kept.write_bytes(kept.read_bytes()[:-100])
    assert {item.key: item.captions for item in read_source(str(folder))} == again


def test_what_is_kept_of_a_tar_is_not_beside_the_data_and_not_without_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "cache"))
    tar = write_tar(tmp_path / "data" / "0.tar", [("1.png", png(1)), ("2.png", png(2)), ("2.txt", "x")])
    assert len(read_source(tar, captions_required=False)) == 2
    assert len(read_source(tar)) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["0.tar"]
