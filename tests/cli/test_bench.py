from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sat_ext.cli.main import main
from tests.media import pattern, real_still, write_clip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for i in range(4):
        clip = write_clip(folder / "clips" / f"c{i}.mp4", 20, 8)
        clip.with_suffix(".txt").write_text(f"Clip {i}.")
    (folder / "stills").mkdir()
    for i in range(4):
        with Image.open(real_still("coffee.png")) as image:
            image.convert("RGB").save(folder / "stills" / f"s{i}.jpg")
        (folder / "stills" / f"s{i}.txt").write_text("Coffee.")
    Image.fromarray(pattern(0)).save(folder / "stills" / "s5.png")
    (folder / "stills" / "s5.txt").write_text("A pattern.")
    path = folder / "run.yaml"
    path.write_text(
        f"""
args: {{num_workers: 3}}
data:
  params:
    buckets: {{frames: [1, 9], sizes: [[64, 96]]}}
    sources:
      - {{name: clips, path: {folder}/clips, share: 0.5}}
      - {{name: stills, path: {folder}/stills, share: 0.5}}
deepspeed: {{train_micro_batch_size_per_gpu: 1}}
"""
    )
    return path


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["sat-ext", "bench", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


def test_every_bucket_is_timed_by_stage_and_the_workers_are_counted(monkeypatch, capsys, base):
    assert run(monkeypatch, "--base", str(base), "--steps", "6", "--step-time", "0.001", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(b["bucket"], b["kind"]) for b in answer["buckets"]] == [("1x64x96", "image"), ("9x64x96", "video")]
    for bucket in answer["buckets"]:
        assert bucket["samples"] >= 3 and min(bucket[stage] for stage in ("decode", "fit", "collate")) > 0
    assert answer["workers"] == 3 and answer["steps"] == 6
    needed = answer["seconds_per_batch"] / 0.001
    assert needed <= answer["workers_needed"] < needed + 1


def test_a_person_reads_a_table_and_one_sentence(monkeypatch, capsys, base):
    assert run(monkeypatch, "--base", str(base), "--steps", "2") == 0
    out = capsys.readouterr().out
    assert "9x64x96" in out and "video" in out and "decode ms" in out
    assert "One worker makes a batch in " in out and "The 3 of args.num_workers feed steps of " in out
    assert run(monkeypatch, "--base", str(base), "--steps", "2", "--step-time", "1000") == 0
    assert "Steps of 1000 s are fed by 1 worker (args.num_workers, per rank; it is 3)." in capsys.readouterr().out


def test_a_step_of_several_batches_needs_more_workers_and_unseen_buckets_are_named(
    monkeypatch, capsys, tmp_path, base
):
    more = tmp_path / "more.yaml"
    more.write_text("data: {params: {batch: {1: 1, 9: 1}}}\ndeepspeed: {gradient_accumulation_steps: 8}\n")
    options = ("--base", str(base), str(more), "--steps", "2", "--step-time", "0.01")
    assert run(monkeypatch, *options, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["batches_per_step"] == 8
    needed = 8 * answer["seconds_per_batch"] / 0.01
    assert needed <= answer["workers_needed"] < needed + 1
    only_stills = tmp_path / "stills.yaml"
    text = base.read_text().replace("/clips, share: 0.5", "/clips, share: 0.01")
    only_stills.write_text(text)
    assert run(monkeypatch, "--base", str(only_stills), "--steps", "2") == 0
    assert "Not among these 2 batches, and not counted: 9x64x96; raise --steps." in capsys.readouterr().out


def test_a_wrong_call_says_so(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--base", str(tmp_path / "gone.yaml")) == 2
    assert "gone.yaml" in capsys.readouterr().err
