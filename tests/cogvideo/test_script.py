"""Our train_video.py with a model YAML of CogVideo: it runs the checkout's script, or says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sat_ext.cogvideo.script import is_for_script, run_script
from sat_ext.errors import ConfigError

OURS = Path(__file__).parents[2] / "train_video.py"
THEIRS = """
import os, sys
from arguments import NAME
from sat_ext.errors import ConfigError
print(NAME, __name__, [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")], sys.argv)
if "--fail" in sys.argv:
    raise ConfigError("args.load: there is no such folder; name another.")
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.yaml"
    file.write_text("model: {network_config: {target: dit_video_concat.DiffusionTransformer}}")
    return file


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "sat"
    folder.mkdir()
    (folder / "train_video.py").write_text(THEIRS)
    (folder / "arguments.py").write_text("NAME = 'theirs'")
    (folder / "dit_video_concat.py").write_text("")
    return folder


def run(*arguments: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("COGVIDEO_SAT", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["COGVIDEO_SAT"] = str(checkout)
    command = [sys.executable, str(OURS), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_the_checkouts_own_script_runs_with_the_same_arguments(model: Path, checkout: Path) -> None:
    ended = run("--local_rank=0", "--base", str(model), "--seed", "7", checkout=checkout)
    assert ended.returncode == 0, ended.stderr
    script = str(checkout / "train_video.py")
    expected = [script, "--local_rank=0", "--base", str(model), "--seed", "7"]
    assert ended.stdout.splitlines()[-1] == f"theirs __main__ ['0', '1', '0'] {expected}"


def test_its_errors_for_the_user_are_sentences(model: Path, checkout: Path) -> None:
    ended = run("--base", str(model), "--fail", checkout=checkout)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: args.load: there is no such folder; name another."
    assert "Traceback" not in ended.stderr


def test_without_a_checkout_it_says_what_to_set(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_for_script(["--seed", "7", "--base", str(model)])
    assert not is_for_script(["--base", str(OURS.parent / "configs" / "model" / "tiny.yaml")])
    assert not is_for_script([])
    monkeypatch.delenv("COGVIDEO_SAT", raising=False)
    with pytest.raises(
        ConfigError,
        match=r"model\.network_config: a model YAML of CogVideo needs CogVideo's code; set the environment "
        r"variable COGVIDEO_SAT to the sat folder of a checkout, or use a file of configs/model/\.",
    ):
        run_script()
    monkeypatch.setenv("COGVIDEO_SAT", str(tmp_path))
    with pytest.raises(
        ConfigError, match=f"COGVIDEO_SAT: {tmp_path} holds no train_video.py of CogVideo; name its"
    ):
        run_script()
