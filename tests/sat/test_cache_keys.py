"""The table of a cache's keys, and starts that go through all records or, as nothing has changed, do not."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sat_ext.config import load
from sat_ext.data import clips
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.errors import DataError, MediaError
from sat_ext.latents import keys as module
from sat_ext.latents.encoders import Fingerprints
from sat_ext.latents.keys import KeyTable, packed
from sat_ext.latents.reader import Entries, LatentReader, captions_of, open_reader
from sat_ext.latents.store import Entry, LatentStore, write_latents
from sat_ext.latents.text import write_text_embeddings

PRINTS = Fingerprints(first_stage="e", text={})


def entry(number: int, bad: str | None = None) -> Entry:
    return Entry(name=f"all/{number}", media="m", clip="c", size="1x8x8", encoder="e", bad=bad)


def add(folder: Path, *numbers: int) -> None:
    write_latents(folder, [(entry(n), {"mean": torch.full((2,), float(n))}) for n in numbers])


def listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LatentStore, int]:
    """The store, and how many files' headers it read."""
    opened: list[Path] = []
    original = module._list

    def watched(files: list[Path], read: Any) -> Any:
        opened.extend(files)
        return original(files, read)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_list", watched)
        return LatentStore(folder), len(opened)


def test_a_table_is_kept_and_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, *range(50))
    add(tmp_path, *range(50, 70))
    write_latents(tmp_path, [(entry(70, "broken"), {}), (entry(3, "broken"), {})])
    wanted = packed(entry(n).key for n in range(80))
    for count in (3, 0):
        store, read = listed(tmp_path, monkeypatch)
        assert read == count
        assert store.table.has(wanted).tolist() == [True] * 71 + [False] * 9
        assert [float(store.read(entry(n).key)["mean"][0]) for n in (0, 49, 50, 69)] == [0, 49, 50, 69]
        for bad in (3, 70):  # 3 is in two files; it was bad when it was encoded, and is not encoded again
            with pytest.raises(MediaError, match=f"all/{bad}: broken"):
                store.read(entry(bad).key)
        with pytest.raises(DataError, match=f"the sample {entry(71).key} is not in this cache; run sat-ext cache"):
            store.read(entry(71).key)
    add(tmp_path, 71)
    assert listed(tmp_path, monkeypatch)[1] == 4
    os.utime(store.table.files[0], ns=(0, 1))
    assert listed(tmp_path, monkeypatch)[1] == 4
    store.table.files[1].unlink()
    assert listed(tmp_path, monkeypatch)[1] == 3
    content = bytearray((tmp_path / "latents.index").read_bytes())
    content[-1] ^= 1
    (tmp_path / "latents.index").write_bytes(content)
    assert [listed(tmp_path, monkeypatch)[1] for _ in range(2)] == [3, 0]


def test_a_folder_that_cannot_be_written_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise DataError("read-only")

    add(tmp_path, 1, 2)
    monkeypatch.setattr(module, "write_checksummed", refused)
    for _ in range(2):
        store, read = listed(tmp_path, monkeypatch)
        assert read == 1 and store.table.has(packed([entry(2).key])).all()
    assert not (tmp_path / "latents.index").exists()


def test_a_table_has_what_a_dict_has(tmp_path: Path) -> None:
    """Also for keys with zero bytes at their ends, which NumPy's bytes leave out."""
    rng = np.random.default_rng(0)
    names = [bytes(rng.integers(0, 3, 16, np.uint8) * 127).hex() for _ in range(5000)]
    for number in range(5):
        (tmp_path / f"x-{number}.safetensors").touch()
    of = {tmp_path / f"x-{n}.safetensors": names[n * 900 : (n + 1) * 900] for n in range(5)}
    table = KeyTable(tmp_path, "x", lambda file: (of[file], (), "note"))
    expected = {key: file for file in reversed(of) for key in of[file]}
    assert table.has(packed(names)).tolist() == [name in expected for name in names]
    for name in names:
        assert table.find(name) == ((expected[name], False) if name in expected else None)
    buffers: list[Any] = []
    header = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
    assert len(header) < 2000 and len(buffers) == 2  # so ranks of a machine map one copy


def test_a_second_start_goes_through_no_records_unless_something_changed(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    params = {"video_size": [32, 32], "max_num_frames": 5, "cache": {"folder": str(cache)}}
    config = load(DataConfig, params, "data.params")
    index = build_index([SourceConfig(path=str(demo / "train"))], config)
    write_text_embeddings(cache, captions_of([index]).to_pylist(), lambda of: torch.zeros(len(of), 2, 3), {})
    write_latents(
        cache,
        [(e, {"mean": torch.zeros(1)}) for _, e in Entries(index=index, config=config, encoder="e", clips=1)],
    )
    passes: list[int] = []
    keys = Entries.keys
    monkeypatch.setattr(Entries, "keys", lambda self, group: (passes.append(1), keys(self, group))[1])

    def start(config: DataConfig = config, **changes: Any) -> bool:
        """Whether it went through all records."""
        passes.clear()
        of = replace(index, made=index.made + 1, **changes)
        reader = open_reader(config, of, PRINTS, draws=True, conditions=False, share=lambda make: make())
        assert isinstance(reader, LatentReader)
        return bool(passes)

    assert [start(), start(), start()] == [True, False, False]
    # the same records in another order
    assert start(groups=index.groups[::-1])
    with pytest.raises(DataError, match="the choice of its frames"):
        start(replace(config, seed=5))
    fingerprints = index.table["fingerprint"].to_pylist()
    place = index.table.schema.get_field_index("fingerprint")
    changed = index.table.set_column(place, "fingerprint", [["new", *fingerprints[1:]]])
    with pytest.raises(DataError, match="the file itself changed"):
        start(table=changed)
    assert not start()
    add(cache, 1)
    assert [start(), start()] == [True, False]
    # a sampler whose code has changed: no file and no option has
    name = next(iter(index.samplers.values()))
    pick = clips.SAMPLERS[name]
    monkeypatch.setitem(
        clips.SAMPLERS,
        name,
        replace(pick, pick=lambda window, frames, fps, rng: window.run((frames - 1) / 100, frames, fps)),
    )
    with pytest.raises(DataError, match="the choice of its frames"):
        start()
    monkeypatch.undo()


def test_the_pass_over_a_group_has_the_keys_of_its_records(demo: Path) -> None:
    """Also where a weight has a record come several times, in windows, and with several draws."""
    config = load(DataConfig, {"video_size": [32, 32], "max_num_frames": 5}, "data.params")
    for sampler in ("all_windows", "random_start"):
        index = build_index([SourceConfig(path=str(demo / "train"), sampler=sampler)], config)
        entries = Entries(index=index, config=config, encoder="e", clips=3)
        for group in index.groups:
            twice = np.repeat(np.arange(len(group.rows)), 2)
            windows = None if group.windows is None else group.windows[twice]
            group = replace(group, rows=group.rows[twice], windows=windows)
            one_by_one = [entries.find(group, r, d)[1].key for r in range(len(group.rows)) for d in range(3)]
            assert entries.keys(group).tolist() == packed(one_by_one).tolist()
