from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sat_ext.data.sources import read_source
from sat_ext.errors import DataError


def put(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def metadata(folder: Path, *names: str) -> None:
    rows = [{"file_name": name, "text": f"caption of {name}", "more": 1} for name in names]
    put(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)))


def keys(path: Path) -> list[str]:
    return [i.key for i in read_source(str(path))]


@pytest.mark.parametrize("prompts", ["prompts.txt", "prompt.txt"])
def test_cogvideos_diffusers_layout_goes_line_by_line(tmp_path, prompts):
    put(tmp_path / prompts, "\ufeffA cat.\n\nA dog,  on a mat. \n")
    put(tmp_path / "videos.txt", "videos/2.mp4\nvideos/1 b.mp4\n")
    items = read_source(str(tmp_path))
    assert [(i.key, i.captions) for i in items] == [
        ("videos/1 b.mp4", ("A dog,  on a mat.",)),
        ("videos/2.mp4", ("A cat.",)),
    ]
    assert items[1].path == str(tmp_path / "videos/2.mp4")


def test_its_lists_may_be_written_on_windows(tmp_path):
    put(tmp_path / "Prompts.TXT", "A cat. \r\n\r\nA dog.\r\n")
    put(tmp_path / "Videos.txt", "Clips\\1.mp4\r\n clips\\2.MP4 \r\n")
    for name in ("1.mp4", "2.mp4"):
        put(tmp_path / "clips" / name)
    found = {i.path: i.captions for i in read_source(str(tmp_path))}
    assert found == {f"{tmp_path}/clips/1.mp4": ("A cat.",), f"{tmp_path}/clips/2.mp4": ("A dog.",)}


def test_its_first_frames_are_counted_but_not_read(tmp_path, caplog):
    put(tmp_path / "prompts.txt", "A cat.\nA dog.\n")
    put(tmp_path / "videos.txt", "videos/1.mp4\nvideos/2.mp4\n")
    put(tmp_path / "images.txt", "images/1.png\nimages/2.png\n")
    assert keys(tmp_path) == ["videos/1.mp4", "videos/2.mp4"]
    assert "first frames that are not read, as a clip's condition is the frame it starts with" in caplog.text
    (tmp_path / "videos.txt").unlink()
    assert keys(tmp_path) == ["images/1.png", "images/2.png"]


def test_lists_of_different_length_are_refused(tmp_path):
    put(tmp_path / "prompts.txt", "A cat.\nA dog.\n")
    put(tmp_path / "videos.txt", "videos/1.mp4\n")
    put(tmp_path / "images.txt", "images/1.png\n")
    with pytest.raises(
        DataError, match=r"different numbers of lines \(2 in prompts\.txt, 1 in videos\.txt, 1 in im"
    ):
        read_source(str(tmp_path))
    put(tmp_path / "prompts.txt", "\n")
    put(tmp_path / "videos.txt", "\n")
    put(tmp_path / "images.txt", "\n")
    with pytest.raises(DataError, match=r"'videos\.txt' is empty; write one path a line"):
        read_source(str(tmp_path))
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"prompts\.txt: not UTF-8 \(.*\); save it as UTF-8"):
        read_source(str(tmp_path))


def test_a_prompt_file_alone_does_not_make_that_layout(tmp_path):
    put(tmp_path / "prompts.mp4")
    put(tmp_path / "prompts.txt", "A cat.")
    assert keys(tmp_path) == ["prompts.mp4"]


def test_hugging_faces_metadata_wins_over_files_beside(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "a.txt", "not this")
    put(tmp_path / "unlisted.png")
    metadata(tmp_path, "a.png", "sub/b.png")
    items = read_source(str(tmp_path))
    assert [(i.key, i.captions[0]) for i in items] == [
        ("a.png", "caption of a.png"),
        ("sub/b.png", "caption of sub/b.png"),
    ]
    assert items[1].path == str(tmp_path / "sub" / "b.png")


def test_hugging_faces_metadata_may_lie_deep(tmp_path):
    metadata(tmp_path / "data" / "train", "a.png")
    put(tmp_path / "data" / "train" / "a.png")
    assert [i.captions[0] for i in read_source(str(tmp_path))] == ["caption of a.png"]


def test_hugging_faces_metadata_may_be_csv_or_parquet(tmp_path):
    put(tmp_path / "csv" / "metadata.csv", "file_name,text\na.png,x\n")
    (tmp_path / "pq").mkdir()
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["x"]}), tmp_path / "pq" / "metadata.parquet")
    assert keys(tmp_path / "csv") == keys(tmp_path / "pq") == ["a.png"]


def test_of_splits_only_train_is_read_and_the_others_by_their_own_name(tmp_path, caplog):
    metadata(tmp_path / "train", "a.png")
    metadata(tmp_path / "test", "b.png")
    assert keys(tmp_path) == ["train/a.png"]
    assert "left out as of other splits than train" in caplog.text and "'test/metadata.jsonl'" in caplog.text
    assert read_source(str(tmp_path))[0].path == str(tmp_path / "train" / "a.png")
    assert keys(tmp_path / "test") == ["b.png"]


def test_subfolders_that_are_no_splits_are_read_together(tmp_path):
    metadata(tmp_path / "cats", "1.png")
    metadata(tmp_path / "tests of dogs", "1.png")
    assert keys(tmp_path) == ["cats/1.png", "tests of dogs/1.png"]


def test_parquet_shards_of_a_hub_data_set(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        cells = [{"bytes": b"\x89PNG", "path": f"{name}-{n}.png"} for n in range(2)]
        table = pa.table({"image": cells, "text": ["x", "y"]})
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    put(tmp_path / "README.md")
    assert keys(tmp_path) == [
        "data/train-00000-of-00002.parquet#0",
        "data/train-00000-of-00002.parquet#1",
        "data/train-00001-of-00002.parquet#0",
        "data/train-00001-of-00002.parquet#1",
    ]
    assert "'data/test-00000-of-00001.parquet'" in caplog.text


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    put(tmp_path / "a.tar")
    put(tmp_path / "sub" / "a.png")
    with pytest.raises(DataError, match=r"it holds 'a\.tar' and 'sub/a\.png', which may be the same data twice"):
        read_source(str(tmp_path))
