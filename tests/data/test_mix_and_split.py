"""Shares by kind, a held-out part, and changed captions, over real files in every kind of source."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sat_ext.data.index import Index, build_index
from sat_ext.data.split import family_of
from sat_ext.data.stream import JointStream
from sat_ext.errors import ConfigError, DataError
from sat_ext.recipe import Recipe, recipe_of
from tests.media import write_clip

CLIPS, STILLS = 12, 30


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, the first frame of each beside it, and stills, in one folder."""
    folder = tmp_path_factory.mktemp("media") / "mixed"
    folder.mkdir()
    clip = write_clip(folder / "clip0.mp4", frames=12, fps=8, size=(64, 64))
    for i in range(1, CLIPS):
        (folder / f"clip{i}.mp4").hardlink_to(clip)
    names = [f"clip{i}" for i in range(CLIPS)] + [f"still{i}" for i in range(STILLS)]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 64), (5 * i, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"cat {name}, red, big, old")
    return folder


def recipe(sources: Any, **params: Any) -> Recipe:
    sources = [{"path": str(s)} if isinstance(s, Path) else s for s in sources]
    params = {"video_size": [64, 64], "max_num_frames": 9, "sources": sources, **params}
    return recipe_of({"data": {"params": params}, "args": {"batch_size": 2}})


def index_of(run: Recipe, which: str = "train_data") -> Index:
    return build_index(run.lists[which], run.data)


def keys_of(index: Index) -> Counter[str]:
    return Counter(index.table["key"].to_pylist())


def test_shares_hold_over_kinds_as_they_do_over_sources(mixed: Path) -> None:
    run = recipe([mixed], mix={"image": 0.3, "video": 0.6, "first_frame": 0.1})
    stream = JointStream(index_of(run), run.data, size=run.step_size, world=1, dtype=run.dtype)
    seen: Counter[str] = Counter()
    for parts in islice(stream.schedule.steps(), 2000):
        for part in parts:
            seen[stream.schedule.cells[part.cell].source] += part.samples
    total = seen.total()
    for part, share in (("image", 0.3), ("video", 0.6), ("first_frame", 0.1)):
        assert abs(seen[f"mixed:{part}"] - share * total) <= 2, seen
    kinds = {(c.source, c.bucket.kind, c.records) for c in stream.schedule.cells}
    assert kinds == {
        ("mixed:image", "image", CLIPS + STILLS), ("mixed:video", "video", CLIPS),
        ("mixed:first_frame", "image", CLIPS),
    }  # fmt: skip


def test_a_source_without_a_kind_leaves_the_share_to_those_that_have_it(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("one")
    Image.new("RGB", (64, 64)).save(tmp_path / "only.png")
    sources = [{"path": str(tmp_path), "name": "one", "share": 2}, {"path": str(mixed), "share": 1}]
    index = index_of(recipe(sources, mix={"video": 0.6, "image": 0.4}))
    for group in index.groups:  # the rows say which source they are of, too
        assert {index.table["source"][int(row)].as_py() for row in group.rows} == {group.source}
    assert index.shares == pytest.approx({"mixed:image": 0.4 / 3, "mixed:video": 0.6, "one:image": 0.8 / 3})
    assert not index.dropped and not index.bad


def test_by_hand_a_kind_is_the_same(mixed: Path) -> None:
    sources = [{"path": str(mixed), "name": kind, "kind": kind, "share": 1} for kind in ("image", "video")]
    groups = {(g.source, g.bucket.kind, len(g.rows)) for g in index_of(recipe(sources)).groups}
    assert groups == {("image", "image", CLIPS + STILLS), ("video", "video", CLIPS)}


@pytest.mark.parametrize(
    "params, sentence",
    [
        ({"mix": {"image": 1, "clips": 2}}, "'clips' is not one of image, video, first_frame"),
        ({"mix": {"image": 0}}, "write shares above 0"),
        ({"mix": {}}, "write shares above 0"),
        ({"held_out": 0}, "data.params.held_out: 0; write a part"),
        ({"held_out": 1.5}, "data.params.held_out: 1.5; write a part"),
        ({"caption": {"keep_tags": 1}}, "no tags are shuffled; set shuffle_tags"),
        ({"caption": {"shuffle_tags": 1000}}, "caption.shuffle_tags: 1000; use 0 or more, at most 100"),
    ],
)
def test_a_value_that_cannot_be_is_refused(mixed: Path, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        recipe([mixed], **params)


def test_a_kind_that_no_source_has_is_an_error(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("one")
    Image.new("RGB", (64, 64)).save(tmp_path / "only.png")
    with pytest.raises(
        DataError, match=r"data.params.mix: video is to have a share of 0.5, but no source has clips"
    ):
        index_of(recipe([tmp_path], mix={"image": 0.5, "video": 0.5}))
    with pytest.raises(ConfigError, match="all of '.*' would be stills, as its sampler is 'first_frame'"):
        recipe([{"path": str(mixed), "sampler": "first_frame"}], mix={"image": 1, "video": 1})
    with pytest.raises(ConfigError, match="every sample of sat_ext.FirstFrameDataset is a still"):
        params = {"video_size": [64, 64], "mix": {"image": 1}}
        recipe_of({"data": {"target": "sat_ext.FirstFrameDataset", "params": params}})


def sources_of_all_kinds(mixed: Path, folder: Path) -> list[Any]:
    """The files of `mixed` once more in a table (twice each, with other captions), in tars, and in cells."""
    names = sorted(p.name for p in mixed.iterdir() if p.suffix in (".mp4", ".png"))
    rows = [{"path": f"../{mixed.name}/{n}", "caption": f"{c} {n}"} for n in names for c in ("A", "B")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for path in sorted(p for p in mixed.iterdir() if p.is_file()):
            if not (path.suffix == ".png" and path.name.startswith("clip")):
                tar.addfile(_member(path.name, path.stat().st_size), io.BytesIO(path.read_bytes()))
    cells = [{"path": n, "bytes": (mixed / n).read_bytes()} for n in names if n.endswith(".png")]
    texts = [f"cell {n['path']}" for n in cells]
    pq.write_table(pa.table({"image": cells, "text": texts}), folder / "cells.parquet")
    return [folder / "rows.jsonl", folder / "shard.tar", folder / "cells.parquet"]


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


@pytest.mark.parametrize("held_out", [0.2, 9])
def test_what_is_held_out_is_never_trained_on(mixed: Path, tmp_path: Path, held_out: float) -> None:
    folder = mixed.parent / f"{tmp_path.name}"
    folder.mkdir()
    others = sources_of_all_kinds(mixed, folder)
    roots = [str(mixed.parent)]
    run = recipe([mixed, *others], held_out=held_out, allowed_roots=roots, mix={"image": 1, "video": 1})
    trained, kept = index_of(run), index_of(run, "valid_data")

    def entries(index: Index) -> set[tuple[str, str]]:
        sources = (s.partition(":")[0] for s in index.table["source"].to_pylist())
        return set(zip(sources, index.table["key"].to_pylist()))

    assert not entries(trained) & entries(kept)
    everything = recipe([mixed, *others], allowed_roots=roots)
    assert entries(trained) | entries(kept) == entries(index_of(everything))
    for own in ({mixed.name, "rows"}, {"shard"}):  # the table names the folder's files
        names = [
            {family_of(key).rpartition("/")[2] for source, key in entries(i) if source in own}
            for i in (trained, kept)
        ]
        assert names[0] and not names[0] & names[1]  # a clip, its first frame, and both of its rows
    assert entries(kept)
    paths = [set(index.table["path"].to_pylist()) for index in (trained, kept)]
    assert not paths[0] & paths[1]
    if held_out == 9:
        assert 9 <= kept.table.num_rows < 9 + 7


def test_a_part_stays_held_out_when_files_are_added(mixed: Path, tmp_path: Path) -> None:
    for i in range(40):
        Image.new("RGB", (64, 64)).save(tmp_path / f"new{i}.png")
        (tmp_path / f"new{i}.txt").write_text("new")
    before, after = (
        keys_of(index_of(recipe(sources, held_out=0.2), "valid_data")) for sources in ([mixed], [mixed, tmp_path])
    )
    assert before and set(before) == {k for k in after if not k.startswith("new")}


def test_held_out_beside_other_held_out_data_is_refused(mixed: Path) -> None:
    params = {"video_size": [64, 64], "sources": [{"path": str(mixed)}], "held_out": 0.1}
    with pytest.raises(ConfigError, match=r"args.valid_data: 'a', but data.params.held_out: 0.1 holds out"):
        recipe_of({"data": {"params": params}, "args": {"valid_data": ["a"]}})
    with pytest.raises(DataError, match=r"data.params.held_out: 0.0001 of 54 records is none"):
        index_of(recipe([mixed], held_out=0.0001), "valid_data")
    with pytest.raises(DataError, match=r"data.params.held_out: 100 takes all records of"):
        index_of(recipe([mixed], held_out=100))


def test_captions_change_by_source(mixed: Path) -> None:
    sources = [
        {"path": str(mixed), "name": "style", "kind": "image", "caption": {"trigger": "ohwx", "prefix": "Ink: "}},
        {"path": str(mixed), "name": "clips", "kind": "video"},
    ]
    index = index_of(recipe(sources, caption={"shuffle_tags": 3, "keep_tags": 1}))
    rows = index.table.to_pylist()
    style = {row["key"]: row["captions"] for row in rows if row["source"] == "style"}
    assert style["still3.png"] == ["Ink: ohwx, cat still3, red, big, old"]
    clips = {row["key"]: row["captions"] for row in rows if row["source"] == "clips"}
    assert len(clips["clip0.mp4"]) == 3
    assert {tuple(sorted(c.split(", "))) for c in clips["clip0.mp4"]} == {("big", "cat clip0", "old", "red")}
    assert {c.partition(",")[0] for c in clips["clip0.mp4"]} == {"cat clip0"}
    assert len({c.replace("clip1", "clip0") for own in clips.values() for c in own}) > 3  # not all alike
