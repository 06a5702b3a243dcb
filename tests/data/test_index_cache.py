"""What is probed once is not probed again, as long as the file is the same: over real files and folders."""

from __future__ import annotations

import logging
import os
import random
import stat
import tarfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from sat_ext.config import load
from sat_ext.data.index import Index, build_index, probe_cache, probing
from sat_ext.data.params import DataConfig
from sat_ext.data.probe import probe
from sat_ext.data.sources import SourceConfig
from sat_ext.latents.checksummed import write_checksummed
from tests.media import write_clip
from tests.servers import http_server

CONFIG = load(DataConfig, {"video_size": [64, 64], "max_num_frames": 9}, "data.params")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight stills and a clip."""
    for number in range(8):
        write_still(tmp_path / "data" / f"{number}.png")
    write_clip(tmp_path / "data" / "clips" / "a.mp4", frames=9).with_suffix(".txt").write_text("a clip")
    return tmp_path / "data"


def write_still(path: Path, size: tuple[int, int] = (80, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 40, 90)).save(path)
    path.with_suffix(".txt").write_text("a still")
    return path


def build(*paths: Path | str, config: DataConfig = CONFIG) -> tuple[Index, int]:
    """The index, and how many files were probed for it."""
    counts: list[int] = []

    def probing(outcomes: Iterable[Any], total: int) -> Iterable[Any]:
        outcomes = list(outcomes)
        assert len(outcomes) == total
        counts.append(total)
        return outcomes

    sources = [SourceConfig(path=str(p), name=f"s{i}") for i, p in enumerate(paths)]
    index = build_index(sources, config, probing=probing)
    return index, sum(counts)


def cached(folder: Path) -> pa.Table:
    return probe_cache.load(str(folder))


def keys(index: Index) -> set[str]:
    return set(index.table.column("key").to_pylist())


def test_the_second_run_probes_nothing_and_finds_the_same(folder: Path) -> None:
    first, probed = build(folder)
    again, probed_again = build(folder)
    assert (probed, probed_again) == (9, 0)
    assert again.table.equals(first.table)
    assert (folder / ".sat_ext" / "index.arrow").is_file()


def test_ten_files_more_are_ten_probes(folder: Path) -> None:
    build(folder)
    for number in range(10):
        write_still(folder / "more" / f"{number}.jpg")
    index, probed = build(folder)
    assert probed == 10
    assert index.table.num_rows == 19
    assert build(folder)[1] == 0


def test_a_changed_file_is_probed_again(folder: Path) -> None:
    build(folder)
    write_still(folder / "3.png", size=(33, 44))
    index, probed = build(folder)
    assert probed == 1
    rows = {row["key"]: (row["width"], row["height"]) for row in index.table.to_pylist()}
    assert rows["3.png"] == (33, 44)
    assert rows["4.png"] == (80, 60)


def test_a_file_of_the_same_size_written_later_is_probed_again(folder: Path) -> None:
    build(folder)
    status = os.stat(folder / "3.png")
    os.utime(folder / "3.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert build(folder)[1] == 1


def test_a_removed_file_vanishes_from_the_index_and_the_cache(folder: Path) -> None:
    build(folder)
    (folder / "3.png").unlink()
    index, probed = build(folder)
    assert probed == 0
    assert "3.png" not in keys(index)
    assert sorted(cached(folder)["path"].to_pylist()) == [
        *(f"{n}.png" for n in (0, 1, 2, 4, 5, 6, 7)),
        "clips/a.mp4",
    ]


def test_a_data_set_that_was_moved_is_not_probed_again(folder: Path, tmp_path: Path) -> None:
    build(folder)
    folder.rename(tmp_path / "elsewhere")
    index, probed = build(tmp_path / "elsewhere")
    assert probed == 0
    assert index.item(0)[0].path.startswith(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("spelling", ["{}/", "{}/.", "{}/../data"])
def test_one_folder_spelt_in_several_ways_has_one_cache(folder: Path, spelling: str) -> None:
    build(folder)
    assert build(spelling.format(folder))[1] == 0


def test_a_relative_path_finds_the_same_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.chdir(folder.parent)
    assert build("data")[1] == 0


@pytest.mark.parametrize("damage", ["noise", "cut", "empty", "other columns", "width", "fps", "duration", "pipe"])
def test_a_broken_cache_is_rebuilt_with_a_warning(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = build(folder)
    file = folder / ".sat_ext" / "index.arrow"
    impossible = {"width": -5, "fps": float("nan"), "duration": float("inf")}
    if damage == "other columns":
        table = pa.table({"path": ["a"]})
    elif damage in impossible:
        table = cached(folder)
        column = table.schema.get_field_index(damage)
        values = pa.array([impossible[damage]] * len(table), table.schema.field(column).type)
        table = table.set_column(column, table.schema.field(column), values)
    if damage == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif damage == "other columns" or damage in impossible:
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        data = file.read_bytes()
        file.write_bytes({"noise": os.urandom(5000), "cut": data[:-300], "empty": b""}[damage])
    caplog.clear()
    index, probed = build(folder)
    assert probed == 9
    assert f"{file}: not a readable cache (" in caplog.text
    assert "; all files are probed again." in caplog.text
    assert index.table.equals(whole.table)
    assert build(folder)[1] == 0


def test_offsets_that_point_out_of_the_file_are_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Arrow itself would read the memory that they point to. The file is one without a checksum."""
    build(folder)
    file = folder / ".sat_ext" / "index.arrow"
    data = bytearray(file.read_bytes()[: -probe_cache._TRAILER.size])
    file.write_bytes(data)
    assert build(folder)[1] == 0
    offsets = pa.array(cached(folder)["path"].to_pylist(), pa.large_string()).buffers()[1]
    at = data.find(bytes(offsets)[:24])
    assert at > 0
    data[at + 8 : at + 16] = (1 << 40).to_bytes(8, "little")
    file.write_bytes(data)
    caplog.clear()
    assert build(folder)[1] == 9
    assert "not a readable cache" in caplog.text


def test_a_flipped_bit_anywhere_is_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(folder)
    file, rng = folder / ".sat_ext" / "index.arrow", random.Random(0)
    content, expected = file.read_bytes(), cached(folder)
    caplog.clear()
    for place in [*rng.choices(range(len(content)), k=200), *range(len(content) - 16, len(content))]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        assert probe_cache.load(str(folder)).num_rows == 0
    assert caplog.text.count("not a readable cache") == 216
    file.write_bytes(content)
    assert cached(folder).equals(expected)


def test_another_prober_starts_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    monkeypatch.setattr(probe_cache, "PROBER_VERSION", probe_cache.PROBER_VERSION + 1)
    assert build(folder)[1] == 9


def test_a_bad_file_is_remembered_until_it_or_the_libraries_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "3.png").write_bytes(b"no image at all")
    first, _ = build(folder)
    again, probed = build(folder)
    assert probed == 0
    assert again.bad == first.bad == ((str(folder / "3.png"), "not a readable image: unknown format"),)
    formats = probe_cache.image_formats()
    monkeypatch.setattr(probe_cache, "image_formats", lambda: (*formats, "OF A PACKAGE INSTALLED SINCE"))
    assert build(folder)[1] == 1
    write_still(folder / "3.png")
    fixed, probed = build(folder)
    assert probed == 1
    assert not fixed.bad


def test_a_missing_file_is_bad_and_not_remembered(tmp_path: Path, cache_folder: Path) -> None:
    write_still(tmp_path / "a.png")
    table = tmp_path / "rows.csv"
    table.write_text("path,caption\na.png,here\nb.png,not here\n")
    index, probed = build(table)
    assert (probed, index.bad) == (1, ((str(tmp_path / "b.png"), "no such file"),))
    write_still(tmp_path / "b.png")
    index, probed = build(table)
    assert (probed, index.bad) == (1, ())


def test_a_folder_that_cannot_be_written_has_its_cache_elsewhere(folder: Path, cache_folder: Path) -> None:
    (folder / ".sat_ext").write_text("in the way of the folder, also for root")
    assert build(folder)[1] == 9
    assert len(list(cache_folder.glob("*.arrow"))) == 1
    assert build(folder)[1] == 0
    assert (folder / ".sat_ext").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_to_write_has_its_cache_elsewhere(folder: Path, cache_folder: Path) -> None:
    folder.chmod(0o555)
    try:
        assert build(folder)[1] == 9
        assert build(folder)[1] == 0
    finally:
        folder.chmod(0o755)


def test_a_link_in_a_data_set_does_not_lead_the_cache_astray(
    folder: Path, cache_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (folder / ".sat_ext").symlink_to(tmp_path / "precious")
    build(folder)
    assert not list((tmp_path / "precious").iterdir())
    assert build(folder)[1] == 0


def test_where_nothing_can_be_written_the_run_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in_the_way").write_text("")
    monkeypatch.setenv("SAT_EXT_CACHE", str(tmp_path / "in_the_way"))
    (folder / ".sat_ext").write_text("")
    index, _ = build(folder)
    assert index.table.num_rows == 9
    assert f"{folder}: what its files hold cannot be kept for the next run (" in caplog.text
    assert "set SAT_EXT_CACHE to a folder that can be written" in caplog.text


def test_two_sources_of_one_folder_probe_it_once(folder: Path) -> None:
    index, probed = build(folder, folder)
    assert probed == 9
    assert index.table.num_rows == 18
    assert build(folder, folder)[1] == 0


def test_a_file_in_two_sources_is_probed_once_and_known_to_both(folder: Path, cache_folder: Path) -> None:
    table = folder.parent / "rows.jsonl"
    table.write_text('{"path": "data/0.png", "caption": "a still"}\n')
    assert build(folder, table)[1] == 9
    assert build(folder / "clips", folder, table)[1] == 0
    assert build(table)[1] == 0
    assert build(folder / "clips")[1] == 0  # of its own by now


def test_runs_at_the_same_time_leave_a_whole_cache(folder: Path) -> None:
    runs = [threading.Thread(target=build, args=(folder,)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert build(folder)[1] == 0
    assert [p.name for p in (folder / ".sat_ext").iterdir()] == ["index.arrow"]


def test_what_was_probed_is_kept_when_a_run_is_stopped(folder: Path) -> None:
    def stop_after_five(outcomes: Iterable[Any], total: int) -> Iterable[Any]:
        for number, outcome in enumerate(outcomes):
            if number == 5:
                raise KeyboardInterrupt
            yield outcome

    with pytest.raises(KeyboardInterrupt):
        build_index([SourceConfig(path=str(folder))], CONFIG, probing=stop_after_five)
    index, probed = build(folder)
    assert probed == 4
    assert index.table.num_rows == 9


def test_unchanged_caches_are_not_written_again(folder: Path) -> None:
    build(folder)
    before = os.stat(folder / ".sat_ext" / "index.arrow").st_ino
    build(folder)
    assert os.stat(folder / ".sat_ext" / "index.arrow").st_ino == before


def crash(path: str) -> Any:
    if path.endswith("3.png"):
        os.abort()
    return probe(path)


def hang(path: str) -> Any:
    if path.endswith("3.png"):
        threading.Event().wait()
    return probe(path)


@pytest.mark.parametrize(
    ("broken", "timeout", "reason"),
    [  # a limit that the other files keep on a machine that does much else
        (crash, 60, "the process that read it "),
        (hang, 3, "reading it took longer than 3 s (data.params.on_bad_sample.timeout)"),
    ],
)
def test_a_file_that_crashes_or_hangs_the_prober_is_bad_and_the_others_are_not(
    folder: Path, broken: Callable[[str], Any], timeout: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(
        DataConfig,
        {"video_size": [64, 64], "max_num_frames": 9, "on_bad_sample": {"timeout": timeout}},
        "data.params",
    )
    with monkeypatch.context() as patched:
        patched.setattr(probing, "probe", broken)
        index, _ = build(folder, config=config)
    ((path, said),) = index.bad
    assert path == str(folder / "3.png")
    assert said.startswith(reason)
    assert index.table.num_rows == 8
    index, probed = build(folder)  # such a verdict is not kept: the machine may have been at fault
    assert (probed, index.bad) == (1, ())


def test_the_log_says_what_was_known(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(folder)
    with caplog.at_level(logging.INFO):
        build(folder)
    assert "0 files probed, 9 known from earlier runs" in caplog.text


def test_urls_are_known_by_what_their_server_tells(folder: Path, tmp_path: Path, cache_folder: Path) -> None:
    (folder / "7.png").write_bytes(b"no image, or cut off on the way")
    with http_server(folder) as served:
        table = tmp_path / "rows.csv"
        names = [*(f"{n}.png" for n in range(8)), "clips/a.mp4"]
        table.write_text("path,caption\n" + "".join(f"{served.url}/{name},one\n" for name in names))
        first, probed = build(table)
        assert probed == 9
        assert [path for path, _ in first.bad] == [f"{served.url}/7.png"]
        served.reset()
        again, probed = build(table)
        assert probed == 1  # what came over a network may be whole the next time
        assert set(served.requests) <= {"HEAD", "GET"}
        assert served.sent < 1000
        assert again.table.equals(first.table)
        write_still(folder / "2.png", size=(200, 100))
        assert build(table)[1] == 2


def test_members_of_a_tar_are_known_by_the_tar(folder: Path, tmp_path: Path, cache_folder: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted(folder.glob("?.*")):
            tar.add(file, file.name)
    index, probed = build(tmp_path / "shard.tar")
    assert (probed, index.table.num_rows) == (8, 8)
    again, probed = build(tmp_path / "shard.tar")
    assert probed == 0
    assert again.table.equals(index.table)
    os.utime(tmp_path / "shard.tar", ns=(0, 1))
    assert build(tmp_path / "shard.tar")[1] == 8


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_that_are_written_aside_have_the_mode_that_the_umask_says(tmp_path, umask, mode):
    """Or others of a group could not read a cache that was made for them."""
    before = os.umask(umask)
    try:
        write_checksummed(tmp_path / "latents-0.safetensors", {"a": torch.zeros(1)}, {})
        probe_cache.save(str(tmp_path), probe_cache.ENTRIES.empty_table())
    finally:
        os.umask(before)
    written = [tmp_path / "latents-0.safetensors", tmp_path / ".sat_ext" / "index.arrow"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [mode] * 2
