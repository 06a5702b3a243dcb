"""What a data set made by a stranger may open: its own files, and what the YAML allows."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sat_ext.config import load
from sat_ext.data.params import DataConfig
from sat_ext.data.probe import probe
from sat_ext.data.sources import read_source
from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.files.ranged import filesystem
from tests.media import read_still
from tests.servers import http_server


def still(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48)).save(path)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def in_jsonl(folder: Path, name: str) -> str:
    return str(text(folder / "t.jsonl", json.dumps({"path": name, "caption": "x"})))


def in_csv(folder: Path, name: str) -> str:
    return str(text(folder / "t.csv", f'path,caption\n"{name}",x\n'))


def in_parquet(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"path": [name], "caption": ["x"]}), folder / "t.parquet")
    return str(folder / "t.parquet")


def in_metadata(folder: Path, name: str) -> str:
    text(folder / "metadata.jsonl", json.dumps({"file_name": name, "text": "x"}))
    return str(folder)


def in_lists(folder: Path, name: str) -> str:
    text(folder / "prompts.txt", "x")
    text(folder / "images.txt", name)
    return str(folder)


KINDS: list[Callable[[Path, str], str]] = [in_jsonl, in_csv, in_parquet, in_metadata, in_lists]


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize(
    "name",
    ["reference://a.png::file:///d/evil.json", "file:///etc/a.png", "LOCAL:///a.png", "memory://a.png", "zip://a.png::s3://b/a.zip",
     "sftp://h/a.png", "dir://a.png::file:///etc", "memory://0.tar#a.png@0+9"],
)  # fmt: skip
def test_rows_name_addresses_of_known_kinds_only(tmp_path, write, name):
    with pytest.raises(DataError, match=r"is a \w+:// address; a data set may name .*; if you trust it, add"):
        read_source(write(tmp_path, name))


def test_a_row_that_makes_fsspec_render_jinja_runs_no_code(tmp_path):
    mark = tmp_path / "ran"
    payload = f"{{{{ cycler.__init__.__globals__.os.popen('id > {mark}').read() }}}}"
    generated = [{"key": payload, "url": "http://x", "dimensions": {"i": [1]}}]
    evil = text(tmp_path / "evil.json", json.dumps({"version": 1, "templates": {}, "refs": {}, "gen": generated}))
    with pytest.raises(DataError, match="line 1: .* is a reference:// address"):
        read_source(in_jsonl(tmp_path, f"reference://a.png::file://{evil}"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", ["s3://b/a.png", "gs://b/a.png", "hf://datasets/u/d/a.png", "https://h/x::y.png", "http://h/a.png"]
)
def test_addresses_of_known_kinds_are_fine(tmp_path, name):
    assert read_source(in_jsonl(tmp_path, name))[0].path == name


def test_behind_two_colons_nothing_is_opened(tmp_path):
    text(tmp_path / "secret.json", "{}")
    fs, path = filesystem(f"memory://a.png::file://{tmp_path}/secret.json")
    assert type(fs).__name__ == "MemoryFileSystem" and path.endswith("secret.json")


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize(
    "name", ["../out.png", "{}/out.png", "deep/../../out.png", "link/out.png", "link.png", "../out.tar#a.png@0+9"]
)
def test_rows_do_not_lead_out_of_the_source(tmp_path, write, name):
    still(tmp_path / "out.png")
    (tmp_path / "set" / "deep").mkdir(parents=True)
    os.symlink(tmp_path, tmp_path / "set" / "link")
    os.symlink("../out.png", tmp_path / "set" / "link.png")
    source = write(tmp_path / "set", name.format(tmp_path))
    with pytest.raises(
        DataError, match=rf"leads to {tmp_path}/out\.\w+, out of the source's folder; .* add '{tmp_path}' to"
    ):
        read_source(source)
    (item,) = read_source(source, allowed_roots=[str(tmp_path)])
    assert item.captions == ("x",)


def test_rows_may_name_files_of_the_source_by_any_path(tmp_path):
    still(tmp_path / "real" / "in.png")
    os.symlink(tmp_path / "real", tmp_path / "set")  # given by the user, and so no way out
    os.symlink("in.png", tmp_path / "real" / "link.png")
    for name in (
        "in.png",
        "./in.png",
        "x/../in.png",
        "link.png",
        f"{tmp_path}/set/in.png",
        f"{tmp_path}/real/in.png",
    ):
        (item,) = read_source(in_jsonl(tmp_path / "set", name))
        assert name.startswith("x/") or probe(item.path).width == 64


def link(target: Path, at: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, at)


def linked_caption(out: Path, folder: Path) -> None:
    still(folder / "a.png")
    link(out / "secret.txt", folder / "a.txt")


def linked_media(out: Path, folder: Path) -> None:
    link(still(out / "a.png"), folder / "a.png")
    text(folder / "a.txt", "x")


def linked_folder(out: Path, folder: Path) -> None:
    still(out / "a.png")
    text(out / "a.txt", "x")
    link(out, folder / "deep" / "er")


def linked_labels(out: Path, folder: Path) -> None:
    still(folder / "videos" / "a.png")
    text(out / "a.txt", "x")
    link(out, folder / "labels")


def linked_table(out: Path, folder: Path) -> None:
    text(out / "secret.txt", '{"file_name": "a.png", "text": "x"}')
    link(out / "secret.txt", folder / "metadata.jsonl")


def linked_prompts(out: Path, folder: Path) -> None:
    text(folder / "images.txt", "a.png")
    link(out / "secret.txt", folder / "prompts.txt")


def linked_tar(out: Path, folder: Path) -> None:
    with tarfile.open(out / "0.tar", "w") as tar:
        for file in (still(out / "a.png"), text(out / "a.txt", "x")):
            tar.add(file, file.name)
    link(out / "0.tar", folder / "0.tar")


def linked_rows_of_a_tar(out: Path, folder: Path) -> None:
    linked_tar(out, out / "unused")
    folder.mkdir()
    os.rename(out / "0.tar", folder / "0.tar")
    link(text(out / "secret.txt", '{"key": "a", "caption": "x"}'), folder / "0.meta.jsonl")


@pytest.mark.parametrize(
    "make",
    [linked_caption, linked_media, linked_folder, linked_labels, linked_table, linked_prompts, linked_tar,
     linked_rows_of_a_tar],
)  # fmt: skip
def test_links_do_not_lead_out_of_a_folder(tmp_path, make):
    out, folder = tmp_path / "out", tmp_path / "set"
    text(out / "secret.txt", "x")
    make(out, folder)
    with pytest.raises(DataError, match=rf"leads to {out}\S*, out of the source's folder; .* add '{out}' to data"):
        read_source(str(folder))
    (item,) = read_source(str(folder), allowed_roots=[str(out)])
    assert item.captions == ("x",)
    if make is linked_labels:  # also of a source that is the folder of the media itself
        with pytest.raises(DataError, match="out of the source's folder"):
            read_source(str(folder / "videos"))


def test_links_that_are_not_read_do_no_harm(tmp_path):
    still(tmp_path / "set" / "a.png")
    text(tmp_path / "set" / "a.txt", "x")
    link(Path("/etc/passwd"), tmp_path / "set" / "README")
    assert len(read_source(str(tmp_path / "set"))) == 1


def test_a_snapshot_of_the_hub_is_links_to_its_blobs(tmp_path):
    """As `snapshot_download` leaves it."""
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "refs").mkdir(parents=True)
    for number, (name, content) in enumerate(
        {"a.txt": b"a caption", "a.png": still(tmp_path / "a.png").read_bytes()}.items()
    ):
        blob = repository / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        link(Path("../../../blobs") / str(number), snapshot / "deep" / name)
    assert read_source(str(snapshot))[0].captions == ("a caption",)
    link(tmp_path / "a.png", snapshot / "b.png")
    text(snapshot / "b.txt", "x")
    with pytest.raises(DataError, match="b.png leads to"):
        read_source(str(snapshot))


def test_a_table_behind_a_url_names_no_local_file(tmp_path):
    still(tmp_path / "out.png")
    with http_server(tmp_path) as server:
        in_jsonl(tmp_path, f"file://{tmp_path}/out.png")
        with pytest.raises(DataError, match=r"t\.jsonl, line 1: .* is a file:// address"):
            read_source(f"{server.url}/t.jsonl")


def test_a_source_given_as_file_is_a_local_one(tmp_path):
    source = in_jsonl(tmp_path / "set", "../out.png")
    with pytest.raises(DataError, match="out of the source's folder"):
        read_source(f"file://{source}")


def test_the_yaml_allows_more(tmp_path):
    fsspec.filesystem("memory").pipe("/reach.png", still(tmp_path / "a.png").read_bytes())
    config = load(DataConfig, {"video_size": [64, 64], "allowed_roots": ["memory://"]}, "data.params")
    (item,) = read_source(in_jsonl(tmp_path, "memory://reach.png"), allowed_roots=config.allowed_roots)
    assert probe(item.path).width == 64
    with pytest.raises(
        ConfigError, match=r"allowed_roots: 'memory://x'; give a folder, such as .*, or a protocol"
    ):
        load(DataConfig, {"video_size": [64, 64], "allowed_roots": ["memory://x"]}, "data.params")


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX", "ICO", "TGA", "SGI", "DDS", "JPEG2000"])
def test_pillow_opens_the_documented_formats_only(tmp_path, kind):
    """Whatever their names say. Of EPS, Pillow would call Ghostscript."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (64, 64)).save(path, format=kind)
    for read in (probe, read_still):
        with pytest.raises(MediaError, match="not a readable image: unknown format"):
            read(str(path))
