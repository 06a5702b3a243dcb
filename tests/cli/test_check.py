from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sat_ext.cli.check import _printable, look, remedy
from sat_ext.cli.main import main
from sat_ext.errors import MediaError
from tests.media import remux, write_clip


def picture(path: Path, size: tuple[int, int] = (96, 64), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.effect_noise(size, 60).convert("RGB")
    image.save(path, **options)
    return path


def captioned(path: Path, text: str = "A pattern.") -> Path:
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two good clips and two good stills."""
    folder = tmp_path / "data"
    captioned(write_clip(folder / "a.mp4", 16, 8))
    captioned(write_clip(folder / "turned.mp4", 8, 8, rotation=90))
    captioned(write_clip(folder / "one.mp4", 1, 8))
    captioned(picture(folder / "b c.jpg"), "日本 “quotes”")
    return folder


class Run:
    """A run of the command as a user starts it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *args: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr("sys.argv", ["sat-ext", "check", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = self.capfd.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capfd)


def rows_of(out: str) -> dict[str, dict[str, Any]]:
    return {os.path.basename(row["path"]): row for row in map(json.loads, out.splitlines())}


def test_all_is_well_is_exit_code_0(run: Run, data: Path) -> None:
    code, out, _ = run(data)
    assert code == 0
    assert "4 files: 2 clips of 3.0 s together, 2 images, 0 bad" in out
    assert "h264" in out
    assert "Bad files" not in out


def test_json_is_one_object_a_line_and_nothing_else(run: Run, data: Path) -> None:
    code, out, _ = run(data, "--json")
    rows = rows_of(out)
    assert code == 0
    assert list(rows) == ["a.mp4", "b c.jpg", "one.mp4", "turned.mp4"]
    keys = ["path", "kind", "width", "height", "frames", "fps", "codec", "caption", "reason"]
    assert all(list(row) == keys for row in rows.values())
    held = {name: [row[k] for k in keys[1:7]] for name, row in rows.items()}
    assert held["a.mp4"] == ["clip", 128, 96, 16, 8.0, "h264"]
    assert held["turned.mp4"] == ["clip", 96, 128, 8, 8.0, "h264"]  # as displayed
    assert held["one.mp4"][:4] == ["image", 128, 96, 1]
    assert held["b c.jpg"] == ["image", 96, 64, 1, 0.0, "jpeg"]
    assert rows["b c.jpg"]["caption"] == "日本 “quotes”"
    assert all(row["reason"] is None for row in rows.values())


def test_bad_files_are_listed_with_reason_and_remedy(run: Run, data: Path) -> None:
    whole = picture(data / "whole.jpg", (800, 600))
    captioned(data / "cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()
    whole = picture(data / "whole.png", (400, 300))
    captioned(data / "cut.png").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()
    captioned(data / "cut.mp4").write_bytes((data / "a.mp4").read_bytes()[:2000])
    captioned(data / "empty.mp4").write_bytes(b"")
    captioned(data / "text.webp").write_text("no picture")
    code, out, _ = run(data)
    assert code == 1
    assert "9 files: 2 clips of 3.0 s together, 2 images, 5 bad" in out
    assert f"{data}/empty.mp4\n    the file is empty (0 bytes); copy or download it again\n" in out
    code, out, _ = run(data, "--json")
    bad = {name for name, row in rows_of(out).items() if row["kind"] == "bad"}
    assert code == 1
    assert bad == {"cut.jpg", "cut.png", "cut.mp4", "empty.mp4", "text.webp"}
    assert all(row["width"] is None and row["reason"] for n, row in rows_of(out).items() if n in bad)


def test_damage_inside_a_clip_is_found_by_full(run: Run, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", 48, 8, gop=48, b_frames=0)
    (tmp_path / "d").mkdir()
    captioned(remux(whole, tmp_path / "d" / "noise.mp4", damage=[30]))
    assert run(tmp_path / "d")[0] == 0  # its headers are well
    code, out, _ = run(tmp_path / "d", "--full")
    assert code == 1
    assert "damaged" in out or "not a readable video" in out


def test_files_without_captions_are_listed_and_warned_of(run: Run, data: Path) -> None:
    (data / "a.txt").unlink()
    code, out, err = run(data, "--json")
    assert code == 0  # nothing is wrong with the file
    assert rows_of(out)["a.mp4"]["caption"] is None
    assert rows_of(out)["one.mp4"]["caption"] == "A pattern."
    assert "warning: 1 of 4 files have no caption" in err


def test_a_run_that_lacks_captions_is_not_well(run: Run, data: Path, tmp_path: Path) -> None:
    (data / "a.txt").unlink()
    base = tmp_path / "run.yaml"
    base.write_text(f"data: {{params: {{video_size: [64, 64], max_num_frames: 9, sources: [{{path: {data}}}]}}}}")
    code, _, err = run("--base", base)
    assert code == 1
    assert "1 of 4 files have no caption" in err
    assert "training refuses the source" in err


def test_base_checks_what_the_run_trains_and_evaluates_on(run: Run, data: Path, tmp_path: Path) -> None:
    held = captioned(picture(tmp_path / "held" / "x.png")).parent
    one = tmp_path / "one.yaml"
    one.write_text(f"args: {{train_data: [{data}]}}")
    two = tmp_path / "two.yaml"
    two.write_text(
        f"args: {{valid_data: [{held}]}}\ndata: {{params: {{video_size: [64, 64], max_num_frames: 9}}}}"
    )
    three = tmp_path / "three.yaml"
    three.write_text(
        "model: {pretrained: nowhere, train: {mode: lora}}\ndeepspeed: {optimizer: {params: {lr: 1.0e-7}}}"
    )
    code, out, err = run("--base", one, two, three, "--json")
    assert "warning: deepspeed.optimizer.params.lr: 1e-07 is a rate for tuning every weight; a LoRA" in err
    assert code == 0
    assert {"a.mp4", "x.png"} <= set(rows_of(out))


def test_base_warns_where_the_longest_bucket_stays_empty(run: Run, data: Path, tmp_path: Path) -> None:
    base = tmp_path / "run.yaml"
    text = "data: {{params: {{video_size: [64, 64], max_num_frames: {}, sources: [{{path: {}}}]}}}}"
    base.write_text(text.format(49, data))
    code, _, err = run("--base", base)
    assert code == 0
    assert (
        "warning: none of the 2 clips is long enough for the longest bucket (49 frames, 6 s at 8 fps), so the "
        "model never trains at that length; the others are shorter: 1 at 17 frames, 1 at 9 frames; add clips of 6 "
        "s or more, or set data.params.max_num_frames to 17.\n" in err
    )
    base.write_text(text.format(17, data))
    assert "longest bucket" not in run("--base", base)[2]


def test_a_single_file_and_a_table_can_be_checked(run: Run, data: Path, tmp_path: Path) -> None:
    assert run(data / "a.mp4", "--json")[0] == 0
    table = tmp_path / "t.jsonl"
    rows = [{"path": "data/a.mp4", "caption": "x"}, {"path": "data/gone.mp4", "caption": "y"}]
    rows += [{"path": "data/one.mp4", "caption": "z", "crop": [0, 0, 500, 500]}]
    table.write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run(table, "--json")
    found = rows_of(out)
    assert code == 1
    assert [row["kind"] for row in found.values()] == ["clip", "bad", "bad"]
    assert "outside its 128x96 pixels" in found["one.mp4"]["reason"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "check: nothing to check; name a folder, a table or a file, or --base with the run's YAML."),
        (["nowhere"], "nowhere: no such file or folder"),
        (["--base", "nowhere.yaml"], "--base: there is no file nowhere.yaml"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_exit_code_2(
    run: Run, args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_an_unknown_key_is_exit_code_2(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("data: {params: {fpz: 8}}")
    code, _, err = run("--base", tmp_path / "x.yaml")
    assert code == 2
    assert err == "error: data.params: unknown key 'fpz'; did you mean 'fps'?\n"


def test_odd_names_stay_on_one_line(run: Run, tmp_path: Path) -> None:
    odd = tmp_path / "d" / "new\nline [red]\x1b[31m.jpg"
    captioned(picture(odd)).write_bytes(b"")
    code, out, _ = run(tmp_path / "d")
    assert code == 1
    assert "new\\nline [red]\\x1b[31m.jpg" in out
    assert "\x1b[31m" not in out
    assert json.loads(run(tmp_path / "d", "--json")[1])["path"] == str(odd)


def test_a_file_that_hangs_is_bad_after_the_time_out(
    run: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(path: str, *, full: bool) -> None:
        while path.endswith("a.mp4"):
            pass
        raise MediaError(path, "other")

    monkeypatch.setattr("sat_ext.cli.check.look", hang)
    code, out, _ = run(data, "--json", "--timeout", "0.5")
    assert code == 1
    assert rows_of(out)["a.mp4"]["reason"] == "reading it took longer than 0.5 s (--timeout)"
    assert rows_of(out)["b c.jpg"]["reason"] == "other"


def test_stills_are_decoded_to_their_end(tmp_path: Path) -> None:
    whole = picture(tmp_path / "a.jpg", (640, 480)).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: int(len(whole) * 0.9)])
    assert look(str(tmp_path / "a.jpg"), full=False).width == 640
    with pytest.raises(MediaError, match="truncated"):
        look(str(tmp_path / "b.jpg"), full=False)


def test_every_reason_has_a_remedy() -> None:
    assert remedy("reading it took longer than 60 s (--timeout)").startswith("convert it with ffmpeg, raise")
    assert remedy("1x1 pixels, over the limit of 3") == "make it smaller"
    assert remedy("whatever") == "copy it again, convert it, or remove it"
    assert _printable("a\tb\udcff") == "a\\tb\\udcff"
