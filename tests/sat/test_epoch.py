"""A run that goes on with other data than it was saved with: what is said of it, and that the numbers are true."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from sat_ext.checkpoint.manifest import CellState, Manifest, RateState, read_manifest, write_manifest
from sat_ext.config import load
from sat_ext.data.index import Index, build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.schedule import Cell, Schedule
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import ConfigError
from sat_ext.sat.checkpoint import epoch
from sat_ext.sat.checkpoint.data_state import samples_used
from sat_ext.sat.run import RunState
from sat_ext.sat.settings import Settings

COUNT, USED, SEED = 40, 56, 7  # in the second epoch, of which 16 are done
COLOURS = np.random.default_rng(0).integers(0, 255, (COUNT + 1, 3))


def write(folder: Path, name: str, number: int) -> None:
    Image.new("RGB", (64 + number % 2 * 64, 64), tuple(map(int, COLOURS[number]))).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"caption {number}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stills of two shapes."""
    found = tmp_path / "stills"
    found.mkdir()
    for number in range(COUNT):
        write(found, f"{number:02}", number)
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed on the first rank."""
    lines: list[str] = []
    monkeypatch.setattr("sat_ext.sat.checkpoint.data_state.print_rank0", lines.append)
    return lines


def index_of(*sources: Any, **params: Any) -> Index:
    sizes = [[64, 64], [64, 128]]
    data = load(DataConfig, {"buckets": {"frames": [1], "sizes": sizes}, **params}, "data.params")
    return build_index([SourceConfig(**({"path": str(s)} if isinstance(s, Path) else s)) for s in sources], data)


def schedule_of(index: Index, seed: int = SEED) -> Schedule:
    cells = [Cell(source=g.source, bucket=g.bucket, records=len(g.rows), tokens=1) for g in index.groups]
    return Schedule(cells, index.shares, seed=seed, world=1)


def save(index: Index, folder: Path) -> RunState:
    """A run that is resumed from a checkpoint of `index`, of which `USED` samples a source were trained on."""
    folder.mkdir()
    found, schedule = epoch.epoch_of(index, schedule_of(index)), schedule_of(index)
    torch.save(list(found.samples), folder / "data.pt")
    totals = {s: sum(len(g.rows) for g in index.groups if g.source == s) for s in index.shares}
    cells = tuple(
        CellState(source=c.source, bucket=str(c.bucket), records=c.records, used=n, keys=k)
        for c, k in zip(schedule.cells, found.keys)
        for n in [USED * c.records // totals[c.source]]
    )
    rate = RateState(num_iters=1, init_step=0, auto_warmup_steps=0, auto_warmup_rate=0.0)
    shares = {s: n / sum(index.shares.values()) for s, n in index.shares.items()}
    files = {"data.pt": (folder / "data.pt").stat().st_size}
    manifest = Manifest(
        sat_ext="0", iteration=1, micro_steps=1, world=1, zero_stage=0, round_robin=False, seed=SEED,
        global_steps=1, global_samples=1, skipped_steps=0, whole=True, base=None, rate=rate, cells=cells,
        files=files, shares=shares,
    )  # fmt: skip
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    return RunState(settings=Settings(), resumed=manifest, folder=folder)


def seen(index: Index, schedule: Schedule, used: list[int], *, coming: bool) -> list[str]:
    """Keys of this epoch's samples, of those to come or of the others."""
    found = []
    for cell, group in enumerate(index.groups):
        places = np.arange(len(group.rows))
        places = places[used[cell] % len(places) :] if coming else places[: used[cell] % len(places)]
        found += [index.item(int(group.rows[r]))[0].key for r in schedule.records(cell, places)]
    return found


def rename(folder: Path) -> None:
    for end in ("png", "txt"):
        (folder / f"03.{end}").rename(folder / f"39x.{end}")


def swap(folder: Path) -> None:
    (folder / "02.png").rename(folder / "x")
    (folder / "04.png").rename(folder / "02.png")
    (folder / "x").rename(folder / "04.png")


def caption(folder: Path) -> None:
    (folder / "05.txt").write_text("another")
    (folder / "06.txt").write_text("another")


def shape(folder: Path) -> None:
    write(folder, "07", 8)


def add(folder: Path) -> None:
    write(folder, "00a", COUNT)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rename, "1 of its 40 samples are gone, 1 are new"),
        (swap, "2 have files of another size or modification time"),
        (caption, "2 have other captions"),
        (shape, "1 have other captions, 1 have files of another size or modification time"),
        (add, "1 are new"),
    ],
)
def test_what_changed_is_said_with_how_many_samples_come_twice_or_not_at_all(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], told: str, said: list[str]
) -> None:
    before = index_of(folder)
    run = save(before, tmp_path / "1")
    assert run.resumed is not None
    done = seen(before, schedule_of(before), [c.used for c in run.resumed.cells], coming=False)
    args = Namespace(sat_ext=run)
    assert samples_used(args, before, SEED) == [c.used for c in run.resumed.cells]
    assert not said
    change(folder)
    after = index_of(folder)
    used = samples_used(args, after, SEED)
    assert used is not None
    coming, rest = (seen(after, schedule_of(after), used, coming=c) for c in (True, False))
    kept = {k for g in before.groups for r in g.rows for k in [before.item(int(r))[0].key]}
    twice = len(set(done) & set(coming))
    missed = len((kept - set(done)) & set(rest))
    assert (
        f"resume: source 'stills' has changed since the checkpoint: {told}; in this epoch {twice} "
        f"samples come twice, and {missed} not at all."
    ) in "\n".join(said)
    assert (twice, missed) == (0, 0) if change in (swap, caption) else twice > 0


def test_other_buckets_shares_sources_and_seeds_are_told_apart(
    folder: Path, tmp_path: Path, said: list[str]
) -> None:
    index = index_of({"path": str(folder), "share": 0.5}, {"path": str(folder), "name": "two", "share": 0.5})
    run = save(index, tmp_path / "1")
    assert run.resumed is not None
    used_before = [c.used for c in run.resumed.cells]
    args = Namespace(sat_ext=run)
    sizes = {"frames": [1], "sizes": [[32, 32]]}
    other = index_of(
        {"path": str(folder), "share": 0.6}, {"path": str(folder), "name": "new", "share": 0.4}, buckets=sizes
    )
    used = samples_used(args, other, SEED + 1)
    assert used == [USED, round(USED / 0.6 * 0.4)]  # where the source was, and where it would be
    out = "\n".join(said)
    for told in (
        "data.params.seed was 7 and is 8; the epoch's order changes",
        "source 'two' is not in the data any more.",
        "source 'new' is new; it joins from now on.",
        "source 'stills' has changed since the checkpoint: its buckets were 1x64x128, 1x64x64; in this epoch ",
    ):
        assert told in out, out
    said.clear()
    shifted = index_of({"path": str(folder), "share": 3}, {"path": str(folder), "name": "two", "share": 2})
    assert samples_used(args, shifted, SEED) == used_before
    assert said == [
        f"resume: the share of source '{name}' was 0.5, and is {share} from now on."
        for name, share in (("stills", 0.6), ("two", 0.4))
    ]
    gone = index_of({"path": str(folder), "name": "three"})
    assert samples_used(args, gone, SEED) == [0, 0]
    assert "none of the checkpoint's sources is in the data any more" in "\n".join(said)


def test_a_checkpoint_without_a_list_of_samples_is_gone_on_with(
    folder: Path, tmp_path: Path, said: list[str]
) -> None:
    index = index_of(folder)
    run = save(index, tmp_path / "1")
    assert run.folder is not None and run.resumed is not None
    text = json.loads((run.folder / "sat_ext.json").read_text())
    del text["checksum"], text["shares"], text["files"]["data.pt"]
    for cell in text["cells"]:
        del cell["keys"]
    (run.folder / "sat_ext.json").write_text(json.dumps(text))
    old = replace(run, resumed=read_manifest(run.folder))
    assert samples_used(Namespace(sat_ext=old), index, SEED) == [c.used for c in run.resumed.cells]
    assert said == [
        "resume: the checkpoint is of an earlier version, which does not list its samples: if the data have "
        "changed since then, some samples of this epoch come twice, and some not at all."
    ]
    content = bytearray((run.folder / "data.pt").read_bytes())
    content[content.find(torch.load(run.folder / "data.pt")[0]["keys"].numpy().tobytes())] ^= 1
    (run.folder / "data.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="data.pt: damaged"):
        samples_used(Namespace(sat_ext=run), index, SEED)


def test_of_very_many_samples_an_estimate_is_said_and_no_change_is_missed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(epoch, "SAMPLED", 10)
    run = save(index_of(folder), tmp_path / "1")
    assert sum(len(s["keys"]) for s in torch.load(tmp_path / "1" / "data.pt")) == 10
    for number in range(20):
        os.remove(folder / f"{number:02}.png")
    samples_used(Namespace(sat_ext=run), index_of(folder), SEED)
    assert re.search(r"about (16|20|24) of its 40 samples are gone; in this epoch (about )?\d+ s", said[0])


def test_hashes_tell_keys_apart_whatever_the_batches_are() -> None:
    keys = ["", "a", "b", "ab", "ba", "a\0", "\0a", "clip/ä.mp4", "x" * 5000, *(str(n) for n in range(10_000))]
    one = epoch._hashes(pa.chunked_array([pa.array(keys)]))
    several = epoch._hashes(pa.chunked_array([pa.array(keys[:3]), pa.array(keys)[3:700], pa.array(keys[700:])]))
    assert np.array_equal(one, several)
    assert len(np.unique(one)) == len(keys)


def test_captions_and_files_are_those_of_their_rows_whatever_the_batches_are(folder: Path) -> None:
    index = index_of(folder)
    cut = replace(index, table=pa.Table.from_batches(index.table.to_batches(max_chunksize=7)))
    rows = np.array([39, 0, 7, 7, 6, 13, 2], np.uint32)
    for part in ("captions", "files"):
        assert np.array_equal(epoch._contents(index, rows)[part], epoch._contents(cut, rows)[part])
    texts = index.table["captions"].to_pylist()
    assert epoch._contents(cut, rows)["captions"].tolist() == [epoch._hash(texts[r][0]) for r in rows]
