from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sat_ext.errors import ConfigError, MediaError
from sat_ext.files import container_of, fingerprint, is_local, is_url, open_binary, ranged, suffix_of
from sat_ext.files.locations import cell_location, member_location
from tests.servers import Served, http_server, s3_server

DATA = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with http_server(tmp_path) as served:
        yield served


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server(monkeypatch) as url:
        yield url


def put(path: Path, data: bytes = DATA) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def tar_of(path: Path, **members: bytes) -> dict[str, str]:
    """Locations of the members of a new tar, by name."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {m.name: member_location(str(path), m.name, m.offset_data, m.size) for m in tar}


def read(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read()


def test_a_location_says_what_it_is():
    member, cell = (
        member_location("s3://b/0.tar", "a b/c.MP4", 512, 9),
        cell_location("t.parquet", "image", 3, ".png"),
    )
    assert [is_local(p) for p in ("a.mp4", "/x/a#b.mp4", member, cell, "s3://b/a.mp4")] == [
        True,
        True,
        *[False] * 3,
    ]
    assert [is_url(p) for p in ("C://a.mp4", "a:b.mp4", member, cell, "hf://datasets/a")] == [
        *(False, False, True, False, True)
    ]
    assert [container_of(p) for p in ("a.mp4", member, cell)] == ["a.mp4", "s3://b/0.tar", "t.parquet"]
    assert [suffix_of(p) for p in (member, cell, "a.tar", "https://h/a.JPG?x=1.txt#f", "s3://b/why?.gif")] == [
        *(".mp4", ".png", ".tar", ".jpg", ".gif")
    ]


def test_a_members_name_cannot_point_to_another_tar():
    assert container_of(member_location("a.tar", "../other.tar#x.mp4", 0, 5)) == "a.tar"


@pytest.mark.parametrize(
    "name", ["with space.mp4", "new\nline.mp4", "猫 の 動画.mp4", "a#b@1+2.mp4", "-x.mp4", "%41.mp4"]
)
def test_odd_names_are_read_from_disk_and_tar(tmp_path, name):
    assert read(put(tmp_path / name)) == DATA
    assert read(tar_of(tmp_path / "t.tar", **{name: DATA})[name]) == DATA


def test_a_member_is_a_window_that_ends_where_it_ends(tmp_path):
    locations = tar_of(tmp_path / "t.tar", **{"a.txt": b"before", "b.bin": DATA, "c.txt": b"after"})
    with open_binary(locations["b.bin"]) as file:
        assert file.seek(-10, os.SEEK_END) == len(DATA) - 10
        assert file.read() == DATA[-10:] and file.read(5) == b""
        assert file.seek(300) == 300 and file.read(5) == DATA[300:305] and file.tell() == 305
        assert file.seek(len(DATA) + 5) and file.read() == b""
    assert len(read(locations["b.bin"])) == len(DATA)
    assert fingerprint(locations["b.bin"]) == fingerprint(str(tmp_path / "t.tar"))


def test_a_tar_that_was_cut_says_so(tmp_path):
    location = tar_of(tmp_path / "t.tar", **{"b.bin": DATA})["b.bin"]
    os.truncate(tmp_path / "t.tar", 512 + 1000)
    with pytest.raises(MediaError, match=r"its tar ends after 1000 of its 10240 bytes"):
        read(location)


def test_what_cannot_be_opened_says_why_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    put(tmp_path / "empty.mp4", b"")
    empty = tar_of(tmp_path / "t.tar", **{"e.jpg": b""})["e.jpg"]
    reasons = {
        str(tmp_path / "none.mp4"): "no such file",
        str(tmp_path): "no such file",
        "nul\0byte.mp4": "no such file",
        str(tmp_path / "pipe.mp4"): "not a regular file",
        str(tmp_path / "empty.mp4"): r"the file is empty \(0 bytes\)",
        empty: r"the file is empty \(0 bytes\)",
        member_location(str(tmp_path / "no.tar"), "a.jpg", 0, 5): "no such file",
        cell_location(str(tmp_path / "no.parquet"), "image", 0, ".jpg"): "no such file",
        "memory://none.mp4": "no such file",
    }
    for path, reason in reasons.items():
        with pytest.raises(MediaError, match=reason) as caught:
            open_binary(path)
        assert caught.value.path == path


def test_a_url_that_nothing_reads_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match=r"nonsense://a\.mp4: fsspec does not read nonsense:// URLs; check it"):
        open_binary("nonsense://a.mp4")


def test_a_package_that_a_url_needs_is_named(monkeypatch):
    def absent(*args: object, **kwargs: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(ranged.fsspec.core, "url_to_fs", absent)
    with pytest.raises(ConfigError, match=r"s3:// cannot be read \(Install s3fs .*\); pip install sat_ext\[s3\]"):
        open_binary("s3://b/a.mp4")


def test_a_fingerprint_changes_with_the_file(tmp_path, server):
    path = put(tmp_path / "a.mp4")
    before, remote_before = fingerprint(path), fingerprint(f"{server.url}/a.mp4")
    put(tmp_path / "a.mp4", DATA + b"more")
    assert fingerprint(path) != before and fingerprint(f"{server.url}/a.mp4") != remote_before


def test_urls_of_every_kind_give_the_same_bytes(tmp_path, server, s3):
    put(tmp_path / "a b.bin")
    fsspec.filesystem("memory").pipe("/a b.bin", DATA)
    fsspec.filesystem("s3").pipe(f"{s3}/a b.bin", DATA)
    for url in (f"{server.url}/a b.bin", f"{server.url}/a%20b.bin", f"{s3}/a b.bin", "memory://a b.bin"):
        assert read(url) == DATA
        with open_binary(url) as file:
            assert file.seek(5000) == 5000 and file.read(7) == DATA[5000:5007]


def test_a_member_of_a_tar_behind_a_url_is_fetched_alone(tmp_path, server):
    members = {"a.bin": bytes(1 << 20), "b.bin": DATA, "c.bin": bytes(1 << 20)}
    location = tar_of(tmp_path / "t.tar", **members)["b.bin"].replace(str(tmp_path), server.url)
    assert read(location) == DATA
    assert server.sent < 100_000


def test_reading_on_takes_ever_longer_ranges(tmp_path, server):
    put(tmp_path / "a.bin", os.urandom(12 << 20))
    with open_binary(f"{server.url}/a.bin") as file:
        while file.read(32768):
            pass
    assert server.sent == 12 << 20
    assert len(server.requests) < 14


@pytest.mark.parametrize("says", [True, False])
def test_a_server_without_ranges_is_one_clear_error(tmp_path, server, says):
    server.ranges, server.says_ranges = False, says
    put(tmp_path / "a.bin", bytes(1 << 20))

    def read_the_middle() -> None:
        with open_binary(f"{server.url}/a.bin") as file:
            file.seek(500_000)
            file.read(10)

    with pytest.raises(MediaError, match="its server does not answer range requests; copy it to a disk"):
        read_the_middle()


def test_a_server_that_hangs_is_given_up(tmp_path, server, monkeypatch):
    put(tmp_path / "a.bin")
    monkeypatch.setattr(ranged, "_READ_TIMEOUT", 0.3)
    with open_binary(f"{server.url}/a.bin") as file:
        server.hangs = True
        with pytest.raises(MediaError, match="its server did not answer in time"):
            file.read(10)


def test_a_server_that_stumbles_is_asked_again(tmp_path, server):
    put(tmp_path / "a.bin")
    with open_binary(f"{server.url}/a.bin") as file:
        server.refuses = 2
        assert file.read() == DATA
    with open_binary(f"{server.url}/a.bin") as file:
        server.refuses = 9
        with pytest.raises(MediaError, match="503"):
            file.read()


def test_a_server_that_is_not_there_says_so():
    with pytest.raises(MediaError, match=r"cannot be read: .*[Cc]onnect"):
        open_binary("http://127.0.0.1:9/a.mp4")


class _Urls(Dataset):
    def __init__(self, urls: list[str]) -> None:
        self.urls = urls

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(read(self.urls[index])), dtype=torch.uint8)


@pytest.mark.timeout(60)
def test_forked_workers_read_urls_that_their_parent_has_read(tmp_path, server, s3):
    put(tmp_path / "a.bin")
    fsspec.filesystem("s3").pipe(f"{s3}/a.bin", DATA)
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [DATA]}), table)
    urls = [f"{server.url}/a.bin", f"{s3}/a.bin", cell_location(str(table), "image", 0, ".bin")]
    assert all(read(url) == DATA for url in urls)  # the parent's own loop and connections are there
    # One worker: a second fork could take over the servers' sockets, which are open in this process.
    loader = DataLoader(_Urls(urls * 4), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all(bytes(data.numpy()) == DATA for data in loader)
    assert all(read(url) == DATA for url in urls)


@pytest.mark.parametrize("embedded", [True, False])
def test_cells_are_read_in_any_order(tmp_path, embedded):
    files = [os.urandom(1000 + n) for n in range(50)]
    column = [{"bytes": f, "path": None} for f in files] if embedded else files
    pq.write_table(pa.table({"image": column, "text": [""] * 50}), tmp_path / "t.parquet", row_group_size=20)
    for row in (0, 1, 49, 3, 20, 19, 48, 3):
        assert read(cell_location(str(tmp_path / "t.parquet"), "image", row, ".jpg")) == files[row]


def test_a_cell_that_is_not_there_says_so(tmp_path):
    table = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": [b"x", None]}), table)
    for column, row, reason in (
        ("image", 2, "row 2 of a table of 2 rows"),
        ("image", 1, "its cell is empty"),
        ("video", 0, "video"),
    ):
        with pytest.raises(MediaError, match=reason):
            open_binary(cell_location(table, column, row, ".jpg"))
    put(tmp_path / "bad.parquet", b"PAR1 nothing")
    with pytest.raises(MediaError, match="cannot be read"):
        open_binary(cell_location(str(tmp_path / "bad.parquet"), "image", 0, ".jpg"))


def test_reading_a_cell_does_not_take_its_row_group_into_memory(tmp_path):
    table = str(tmp_path / "t.parquet")
    column = pa.array([os.urandom(1 << 20) for _ in range(80)])
    how = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}  # small pages
    pq.write_table(pa.table({"video": column}), table, row_group_size=80, **how)
    del column
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    with open_binary(cell_location(table, "video", 79, ".mp4")) as file:
        assert file.seek(0, os.SEEK_END) == 1 << 20
    assert pool.bytes_allocated() - before < 8 << 20


def test_a_cell_behind_a_url_fetches_what_lies_before_it_at_most(tmp_path, server):
    files = [os.urandom(100_000) for _ in range(40)]
    pq.write_table(pa.table({"image": files}), tmp_path / "t.parquet", row_group_size=10, use_dictionary=False)
    assert read(cell_location(f"{server.url}/t.parquet", "image", 20, ".jpg")) == files[20]
    assert server.sent < 2_000_000
