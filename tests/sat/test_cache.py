"""`sat-ext cache`: what it writes, what it goes on with, what it encodes again, and training from it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from argparse import Namespace
from collections import defaultdict
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from sat_ext.cli import cache as command
from sat_ext.config import load
from sat_ext.data.buckets import StepSize
from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.data.stream import JointStream
from sat_ext.engines import engine_of
from sat_ext.errors import ConfigError, DataError, MediaError
from sat_ext.latents import text, writer
from sat_ext.latents.checksummed import _warn_of_unsigned
from sat_ext.latents.encoders import Part
from sat_ext.latents.keys import packed
from sat_ext.latents.reader import Entries, LatentReader, captions_of
from sat_ext.latents.store import LatentStore, write_latents
from sat_ext.latents.text import TextEmbeddings, write_text_embeddings
from sat_ext.latents.writer import Missing
from sat_ext.models.engine import VideoDiffusionEngine
from tests.models.conftest import write_pretrained
from tests.sat.ranks import Running, Server, finish, folder_of
from tests.sat.runs import MODEL, QUICK, write_config


@pytest.fixture
def data(demo: Path, tmp_path: Path) -> Path:
    """A copy of the demo's data, to change."""
    return Path(shutil.copytree(demo, tmp_path / "demo"))


def write_run(
    data: Path, folder: Path, *, cache: Path | None = None, model: Any = MODEL, **params: Any
) -> list[str]:
    """The arguments of a run on `data`, from `cache` where it is given; clips begin at their start."""
    files = write_config(data, folder, stage=2, **QUICK)
    config = yaml.safe_load(Path(files[1]).read_text())
    config["model"] = model
    source = {"name": "all", "path": str(data / "train"), "sampler": "start"}
    config["data"]["params"] |= {"sources": [source], **params}
    if cache is not None:
        config["data"]["params"]["cache"] = {"folder": str(cache)}
    Path(files[1]).write_text(yaml.safe_dump(config))
    return files


def run_cache(server: Server, files: list[str], folder: Path, *more: str, world: int = 1) -> dict[str, Any]:
    """What the command says of itself, which writes to `folder`."""
    run = start(server, files, folder, "--json", "-o", str(folder), *more, world=world)
    finish(run, (0,) * world)
    found: dict[str, Any] = json.loads(next(x for x in run.log().splitlines() if x.startswith("{")))
    return found


def start(
    server: Server, files: list[str], folder: Path, *more: str, world: int = 1, slow_encoding: float = 0
) -> Running:
    logs = folder.parent / f"command{time.monotonic_ns()}"
    return server.start(["cache", *files, *more], world=world, folder=logs, cli=True, slow_encoding=slow_encoding)


def keys_of(store: LatentStore) -> list[str]:
    return [key.hex() for key in store.table.keys.astype("V16").tolist()]


@pytest.mark.multiprocess
def test_training_from_a_cache_has_the_losses_of_training_without(
    server: Server, data: Path, tmp_path: Path
) -> None:
    """On 2 ranks, with data workers: a cosine first stage and a model without condition draw nothing."""
    plain = {**MODEL, "conditioning": "none", "transformer": {**MODEL["transformer"], "in_channels": 16}}
    cache = tmp_path / "cache"
    facts = run_cache(server, write_run(data, tmp_path / "c", model=plain), cache)
    assert facts["samples"] == facts["encoded"] == 20 and not facts["bad"]
    assert len(LatentStore(cache).table.keys) == 20
    expected = server.start(write_run(data, tmp_path / "a", model=plain), world=2, folder=tmp_path / "plain")
    finish(expected)
    files = write_run(data, tmp_path / "b", cache=cache, model=plain)
    cached = server.start([*files, "--num-workers", "2"], world=2, folder=tmp_path / "cached")
    finish(cached)
    for rank in range(2):
        for ours, theirs in zip(cached.records(rank), expected.records(rank), strict=True):
            assert (ours["loss"], ours["keys"]) == (theirs["loss"], theirs["keys"])


@pytest.mark.multiprocess
def test_an_image_to_video_model_trains_from_a_cache_and_goes_on(
    server: Server, data: Path, tmp_path: Path
) -> None:
    folder = write_pretrained(tmp_path / "model", "5b-i2v")
    model = {"pretrained": str(folder), "conditioning": "i2v", "train": {"mode": "lora", "rank": 2, "alpha": 2}}
    cache = tmp_path / "cache"
    run_cache(server, write_run(data, tmp_path / "c", model=model), cache)
    files = write_run(data, tmp_path / "a", cache=cache, model=model)
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "kept")
    run = server.start(files, world=2, folder=tmp_path / "whole")
    statuses = run.wait()
    (folder / "text_encoder" / "kept").rename(folder / "text_encoder" / "model.safetensors")
    assert statuses == [0, 0], run.log()  # no text encoder was loaded: its weights were not there
    assert all(float.fromhex(r["loss"]) > 0 for r in run.records())
    save = folder_of(tmp_path / "a" / "save")
    (save / "latest").write_text("2")
    on = write_run(data, tmp_path / "a", cache=cache, model=model)
    resumed = server.start([*on, "--load", str(save)], world=2, folder=tmp_path / "on")
    finish(resumed)
    for rank in range(2):
        assert resumed.records(rank) == run.records(rank)[2:]


@pytest.mark.multiprocess
def test_ranks_take_work_as_they_get_it_done_and_end_within_a_sample(
    server: Server, data: Path, tmp_path: Path
) -> None:
    """A clip costs 5 stills."""
    files = write_run(data, tmp_path)
    alone = run_cache(server, files, tmp_path / "alone")
    both = tmp_path / "both"
    run = start(server, files, both, "--json", "-o", str(both), world=2, slow_encoding=0.2)
    finish(run)
    done = [re.findall(r"^encoded (\w+) (\d) ([\d.]+)$", run.log(rank), re.M) for rank in range(2)]
    keys = [{key for key, _, _ in of} for of in done]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == alone["samples"] == 20
    clips = [[int(frames) for _, frames, _ in of] for of in done]
    assert all(of == sorted(of, reverse=True) and {*of} == {1, 5} for of in clips)  # the costliest first
    ends = [float(of[-1][2]) for of in done]
    assert abs(ends[0] - ends[1]) < 5 * 0.2
    first, second = LatentStore(tmp_path / "alone"), LatentStore(both)
    assert keys_of(first) == keys_of(second)
    for key in keys_of(first):
        one, two = first.read(key), second.read(key)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.multiprocess
def test_a_rank_that_dies_ends_the_other(server: Server, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    files = write_run(data, tmp_path)
    run = start(server, files, cache, "-o", str(cache), world=2, slow_encoding=0.1)

    def wait_for(word: str, rank: int) -> None:
        deadline, file = time.monotonic() + 120, run.folder / f"rank{rank}.log"
        while not file.exists() or word not in file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_for("encoded", 1)
    os.kill(run.pids[1], signal.SIGKILL)
    wait_for("lost the others: no sign of rank 1", 0)  # not by `wait`, which soon kills the rank that is left
    run.wait()
    assert run_cache(server, files, cache, world=2)["encoded"] < 20  # what both had written is kept


def test_shards_cost_alike_and_hold_every_sample_once() -> None:
    costs = np.sort(np.random.default_rng(0).choice([1, 17, 49], 10_000))[::-1]
    missing = Missing(samples=np.arange(len(costs)), costs=costs, buckets=(), captions=pa.array([""]))
    bounds = missing.shards(8)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and (np.diff(bounds) > 0).all()
    sums = np.add.reduceat(costs, bounds[:-1])
    assert sums.sum() == costs.sum() and sums.max() < 2 * 49
    stills = Missing(samples=np.arange(10**6), costs=np.ones(10**6, int), buckets=(), captions=pa.array([""]))
    assert len(stills.shards(8)) == 8 * 1000 + 1
    none = Missing(samples=np.arange(0), costs=np.arange(0), buckets=(), captions=pa.array([""]))
    assert none.shards(8).tolist() == [0]


@pytest.mark.multiprocess
def test_what_has_changed_is_encoded_alone_and_a_stale_cache_is_refused(
    server: Server, data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    files = write_run(data, tmp_path / "a", cache=cache)
    assert run_cache(server, files, cache)["encoded"] == 20
    assert run_cache(server, files, cache)["encoded"] == 0

    def refused(files: list[str]) -> str:
        run: Running = server.start(files, world=2, folder=tmp_path / f"run{time.monotonic_ns()}")
        assert run.wait() == [1, 1]
        assert not run.records()
        return next(line for line in run.log().splitlines() if line.startswith("error: "))

    clip = sorted((data / "train").rglob("*.mp4"))[0]
    os.utime(clip, (1, 1))
    assert "1 of 20 samples are not in this cache (first: all/" in refused(files)
    assert "since it was encoded, the file itself changed); run 'sat-ext cache --base" in refused(files)
    assert run_cache(server, files, cache)["encoded"] == 1
    other = write_run(data, tmp_path / "b", cache=cache, fps=4)
    assert "the choice of its frames (fps, sampler, skip_frms_num, crop, seed) changed" in refused(other)
    larger = write_run(data, tmp_path / "c", cache=cache, video_size=[48, 48])
    assert "the size or length of its bucket changed" in refused(larger)
    caption = next((data / "train").rglob("*.txt"))
    caption.write_text("something else")
    assert "captions are not in this cache (first: 'something else')" in refused(files)
    facts = run_cache(server, files, cache)
    assert (facts["encoded"], facts["captions_encoded"]) == (0, 1)


def all_of(cache: Path, keys: list[str], captions: list[str]) -> dict[str, Any]:
    """All that a run can read of a cache. What is missing is refused before its first step (`require`)."""
    store, text = LatentStore(cache), TextEmbeddings(cache)
    if not store.table.has(packed(keys)).all() or len(text.lacking(pa.array(captions))):
        raise DataError(f"{cache}: lacks a sample or a caption")
    found: dict[str, Any] = {caption: text[caption] for caption in captions}
    return found | {f"{key}.{part}": value for key in keys for part, value in store.read(key).items()}


def write_small_cache(data: Path, cache: Path) -> tuple[JointStream, list[str]]:
    """What trains from it, and its captions: through the writers of `sat-ext cache`, from made-up encoders."""
    config = load(DataConfig, {"video_size": [32, 32], "max_num_frames": 5}, "data.params")
    index = build_index([SourceConfig(path=str(data / "train"))], config)
    cache.mkdir()
    captions = captions_of([index]).to_pylist()
    write_text_embeddings(cache, captions, lambda texts: torch.randn(len(texts), 4, 8), {"max_length": "4"})
    entries = Entries(index=index, config=config, encoder="e", clips=1)

    def made_up(frames: int) -> dict[str, torch.Tensor]:
        return {
            "mean": torch.randn(frames, 2, 4, 4).bfloat16(), "std": torch.rand(frames, 2, 4, 4).bfloat16(),
            "first": torch.randn(1, 2, 4, 4), "noisy": torch.randn(2, 1, 2, 4, 4),
        }  # fmt: skip

    write_latents(cache, [(entry, made_up(1 + visit.bucket.frames // 4)) for visit, entry in entries])
    reader = LatentReader(entries=entries, store=LatentStore(cache), draws=True, conditions=True)
    size = StepSize.of(dict.fromkeys(config.make_buckets(), 1))
    return JointStream(index, config, size=size, world=1, dtype=torch.uint8, reader=reader), captions


def test_a_flipped_bit_anywhere_in_a_cache_is_found_and_a_damaged_sample_is_replaced(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    stream, captions = write_small_cache(data, cache)
    keys = keys_of(LatentStore(cache))
    expected, rng, damaged = all_of(cache, keys, captions), random.Random(0), 0
    for file in sorted(cache.iterdir()):
        content = bytearray(file.read_bytes())
        header = int.from_bytes(content[:8], "little")
        places = [*range(10), *rng.choices(range(header), k=60), *rng.choices(range(header, len(content)), k=60)]
        for place in places:
            content[place] ^= (bit := 1 << rng.randrange(8))
            file.write_bytes(content)
            try:
                found = all_of(cache, keys, captions)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[k], v) for k, v in expected.items()), (file, place)
            except (DataError, MediaError) as error:
                damaged += "delete it, and run sat-ext cache again" in str(error)
            content[place] ^= bit
        file.write_bytes(content)
    assert damaged > 200
    caplog.clear()
    _warn_of_unsigned.cache_clear()  # it warned where the bit was in the name of the checksum
    before = [b["key"] for b in islice(stream.batches(start=0, rank=0), 20)]
    (latents,) = cache.glob("latents-*")
    content = bytearray(latents.read_bytes())
    content[-1] ^= 1
    latents.write_bytes(content)
    after = [b["key"] for b in islice(stream.batches(start=0, rank=0), 20)]
    assert sum(one != two for one, two in zip(before, after)) == 1
    (line,) = [r.message for r in caplog.records]
    assert re.match(
        rf"skipped: {latents}: damaged: '\w+.std' is not what was written; delete it, and run sat-", line
    )
    caplog.clear()
    save_file({"x": torch.zeros(1)}, cache / "latents-old.safetensors", {"entries": "[]"})
    LatentStore(cache)
    LatentStore(cache)
    assert [r.message for r in caplog.records] == [
        f"{cache}: holds files of an earlier version, without checksums; damage in them goes unnoticed."
    ]


@pytest.mark.multiprocess
def test_a_killed_command_goes_on_where_it_was(server: Server, data: Path, tmp_path: Path) -> None:
    files = write_run(data, tmp_path)
    cache = tmp_path / "cache"
    run = server.start(
        ["cache", *files, "-o", str(cache)], world=1, folder=tmp_path / "killed", cli=True, slow_encoding=0.1
    )
    deadline = time.monotonic() + 60
    while len(list(cache.glob("latents-*.safetensors"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.kill()
    assert run.wait() == [-signal.SIGKILL]
    done = len(LatentStore(cache).table.keys)
    assert 3 <= done < 20
    assert run_cache(server, files, cache)["encoded"] == 20 - done


@pytest.mark.multiprocess
def test_several_draws_of_each_clip_are_kept(server: Server, data: Path, tmp_path: Path) -> None:
    source = {"name": "all", "path": str(data / "train"), "sampler": "random_start"}
    files = write_run(data, tmp_path, sources=[source])
    facts = run_cache(server, files, tmp_path / "cache", "--clips", "3")
    assert facts["clips"] == 3
    assert 20 < facts["samples"] <= 8 + 3 * 12  # a still has one


@pytest.mark.multiprocess
def test_a_bad_file_is_kept_as_bad_and_counted(server: Server, data: Path, tmp_path: Path) -> None:
    files = write_run(data, tmp_path)
    run_cache(server, files, tmp_path / "first")  # probes while the files are whole
    clip = sorted((data / "train").rglob("*.mp4"))[0]
    status = clip.stat()
    content = bytearray(clip.read_bytes())
    content[len(content) // 4 : -1] = bytes(len(content) - 1 - len(content) // 4)
    clip.write_bytes(content)
    os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that it is not probed again
    facts = run_cache(server, files, tmp_path / "cache")
    assert facts["bad"] == [f"all/{clip.relative_to(data / 'train')}"]
    assert run_cache(server, files, tmp_path / "cache")["encoded"] == 0


@pytest.mark.multiprocess
def test_mistakes_are_told_in_a_sentence(server: Server, data: Path, tmp_path: Path) -> None:
    files = write_run(data, tmp_path)
    run = start(server, files, tmp_path / "cache")
    assert run.wait() == [2]
    assert run.log() == "error: -o: name a folder for the cache, or set data.params.cache.folder.\n"
    with pytest.raises(DataError, match=r"the cache will take about 1000000000.0 GB, and .* are free; make"):
        writer.require_room(tmp_path, 10**18)
    model = {**MODEL, "sampling": {"number": 1}}
    args = Namespace(model_config=model, sat_ext=Namespace(cache_folder=str(tmp_path)))
    with pytest.raises(ConfigError, match="model.sampling.number: 1 samples at an evaluation need the first"):
        VideoDiffusionEngine(args)


def test_fingerprints_follow_weights_options_and_dtype(tmp_path: Path) -> None:
    folder = write_pretrained(tmp_path / "model", "5b-i2v")
    model = {"pretrained": str(folder), "conditioning": "i2v"}
    first = engine_of(model).fingerprints(torch.bfloat16)
    assert first == engine_of(model).fingerprints(torch.bfloat16)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert engine_of({**model, "pretrained": str(moved)}).fingerprints(torch.bfloat16) == first
    assert engine_of(model).fingerprints(torch.float32).first_stage != first.first_stage
    tiled = {**model, "first_stage": {"tiling": True}}
    assert engine_of(tiled).fingerprints(torch.bfloat16).first_stage != first.first_stage
    scaled = {**model, "first_stage": {"condition_scale": 1.0}}
    assert engine_of(scaled).fingerprints(torch.bfloat16).first_stage != first.first_stage
    weights = moved / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = engine_of({**model, "pretrained": str(moved)}).fingerprints(torch.bfloat16)
    assert changed.first_stage != first.first_stage and changed.text == first.text


def test_one_encoder_is_loaded_at_a_time(tmp_path: Path) -> None:
    """A GPU of 8 to 16 GB holds T5 or the autoencoder with its activations, and not both."""
    folder = write_pretrained(tmp_path / "model", "5b-i2v")
    model = {"pretrained": str(folder), "conditioning": "i2v"}
    made = engine_of(model).encoders(torch.float32, torch.device("cpu"))
    weights = []
    for part, other in (("text", "first_stage"), ("first_stage", "text")):
        assert made.text is made.first_stage is None
        with made.holding(part):
            assert getattr(made, other) is None
            weights += [StorageWeakRef(p.untyped_storage()) for p in getattr(made, part).parameters()]
            if part == "text":
                width = made.config.transformer.text_embed_dim
                assert made.embed(["a cat"]).shape == (1, made.config.text_length, width)
            else:
                pixels = torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8)
                assert made.moments(pixels)[0].shape[2] == made.config.latent_channels
        assert weights and all(weight.expired() for weight in weights), part


def test_what_a_gpu_cannot_hold_is_told_with_the_remedy_and_text_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error alone is made up: PyTorch raises it where a GPU has no more memory."""
    order: list[str] = []

    class Encoders:
        @contextmanager
        def holding(self, part: Part) -> Any:
            order.append(part)
            yield

        def embed(self, captions: list[str]) -> torch.Tensor:
            return torch.zeros(len(captions), 2, 3)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 6 GiB.")

    monkeypatch.setattr(writer, "write_samples", full)
    one = np.ones(1, np.int64)
    missing = Missing(samples=one, costs=one, buckets=(), captions=pa.array(["a cat"]))
    job: Any = SimpleNamespace(folder=tmp_path, prints=SimpleNamespace(text={}))
    made: Any = Encoders()
    for section, remedy in (
        ({}, "set model.first_stage.tiling: true"),
        ({"network_config": {}}, "frames: 4, recompute: level"),
    ):
        queues: dict[str, Any] = defaultdict(count)
        with pytest.raises(ConfigError, match=f"too small for the first stage .*{remedy}.*is kept"):
            writer.encode_missing(
                job, missing, made, engine_of(section), world=1,
                take=lambda name, queues=queues: next(queues[name]),
                workers=0, progress=lambda name, items, total: items,
            )  # fmt: skip
    assert order == ["text", "first_stage"] * 2
    assert torch.equal(text.TextEmbeddings(tmp_path)["a cat"], torch.zeros(2, 3))


def test_each_rank_encodes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CogVideo's T5 sends its tokens to "cuda", and bitsandbytes asks for the current device. No GPU is here, so
    that of `torch.cuda` which is asked stands in for two."""
    chosen: list[int] = []
    for name, value in (
        ("is_available", lambda: True),
        ("device_count", lambda: 2),
        ("set_device", chosen.append),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        command.own_device()
    assert chosen == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK: 2, but this machine has 2 GPUs; start one process per GPU"):
        command.own_device()


def test_a_kill_costs_a_minute_of_captions_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 on a CPU takes minutes for what a file may hold."""
    monkeypatch.setattr(text, "FILE_SECONDS", -1.0)
    seen = []

    def embed(captions: list[str]) -> torch.Tensor:
        seen.append(len(list(tmp_path.glob("text-*"))))
        return torch.zeros(len(captions), 2, 3)

    text.write_text_embeddings(tmp_path, [f"{i}" for i in range(5)], embed, {}, batch=2)
    assert seen == [0, 1, 2]
