"""CogVideo checkouts to test against: COGVIDEO_SAT names their `sat` folders, several separated by ":"."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image

from tests.media import pattern, write_clip

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDERS = [Path(p).resolve() for p in os.environ.get("COGVIDEO_SAT", "").split(":") if p]
MISSING = "COGVIDEO_SAT is not set: name the sat folder of a CogVideo checkout (tag v1.0, main, or both with ':')"
MINUTES = 8  # for one run, on a machine that does much else


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of these tests may start several runs of the script."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(4 * 60 * MINUTES))


@dataclass(frozen=True)
class Checkout:
    """One generation: its `sat` folder, and the small YAMLs and weights that `tiny.write_all` made of it."""

    sat: Path
    tiny: Path

    @property
    def generation(self) -> str:
        return "1.5" if "1.5" in tiny.model_names(self.sat)[0] else "1.0"


@dataclass(frozen=True)
class Run:
    """One run of the script that has ended: what it said, wrote and was fed."""

    code: int
    log: str
    save: Path
    records: list[list[dict[str, Any]]]  # of every rank, in order

    @property
    def folder(self) -> Path:
        """SAT's folder of the experiment, in `save`."""
        (folder,) = [p for p in self.save.iterdir() if p.is_dir()]
        return folder

    def steps(self, split: str = "train", rank: int = 0) -> list[dict[str, Any]]:
        return [r for r in self.records[rank] if r["split"] == split]

    def losses(self, rank: int = 0) -> list[float]:
        return [r["loss"] for r in self.steps(rank=rank)]

    def keys(self, rank: int = 0) -> list[str]:
        return [key for r in self.steps(rank=rank) for key in r["key"]]

    def kinds(self, split: str = "train", rank: int = 0) -> set[str]:
        return {kind for r in self.steps(split, rank) for kind in r["kind"]}


Launch = Callable[..., Run]


def _name(folder: Path | None) -> str:
    return "no_checkout" if folder is None else folder.parent.name


@pytest.fixture(scope="session", params=FOLDERS or [None], ids=_name)
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """Each checkout in turn, which must look the same when all its runs are done."""
    if request.param is None:
        pytest.skip(MISSING)
    before = contents(request.param)
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_all(request.param, folder)
    yield Checkout(request.param, folder)
    assert contents(request.param) == before, "the checkout was changed"


def contents(folder: Path) -> dict[str, str]:
    """Every file under the folder, by its hash."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` with six clips and six stills, `heldout/` with two of each."""
    folder = tmp_path_factory.mktemp("media")
    for part, number in (("train", 6), ("heldout", 2)):
        for i in range(number):
            clip = write_clip(folder / part / f"clip{i}.mp4", frames=24, fps=8, size=tiny.SIZE)
            clip.with_suffix(".txt").write_text(f"clip number {i}")
            Image.fromarray(pattern(i, *tiny.SIZE)).save(folder / part / f"still{i}.png")
            (folder / part / f"still{i}.txt").write_text(f"still number {i}")
    return folder


@pytest.fixture(scope="module")
def launch(checkout: Checkout, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Run the checkout's script on `media`, with its own YAMLs, our overlays, and settings of the test's own."""

    def run(
        model: str,
        overlays: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        *,
        launcher: str = "python",
        fails: bool = False,
        **args: Any,
    ) -> Run:
        folder = tmp_path_factory.mktemp("run")
        frames = [1, 9, tiny.FRAMES]
        own: dict[str, Any] = {
            "args": {
                "experiment_name": "run", "save": str(folder / "save"), "train_data": [str(media / "train")],
                "valid_data": [str(media / "heldout")],
                "load": str(checkout.tiny / model.removesuffix("_lora") / "transformer"),
            }
            | args,
            # after the overlays, whose sizes are for real models
            "data": {"params": {"video_size": list(tiny.SIZE), "fps": 8, "buckets": {"frames": frames}}},
        }  # fmt: skip
        files = [checkout.tiny / f"{model}.yaml", checkout.tiny / "sft.yaml"]
        files += [ROOT / "configs" / "cogvideo" / f"{name}.yaml" for name in overlays]
        files += [tiny.write_yaml(folder / "own.yaml", own), tiny.write_yaml(folder / "more.yaml", settings or {})]
        code, log = call(checkout.sat, files, launcher, folder / "record")
        assert (code != 0) == fails, log[-5000:]
        lines = [p.read_text().splitlines() for p in sorted((folder / "record").glob("*.jsonl"))]
        return Run(code, log, folder / "save", [[json.loads(line) for line in rank] for rank in lines])

    return run


def call(sat: Path, files: Sequence[Path], launcher: str, record: Path) -> tuple[int, str]:
    """The exit status of the script, and all that it printed. Nothing of it is left running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = {
        "python": [sys.executable],
        "torchrun": [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port,
        ],
        "deepspeed": [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port,
        ],
    }[launcher]  # fmt: skip
    env = os.environ | {"COGVIDEO_SAT": str(sat), "ON_CPU_RECORD": str(record), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, str(HERE / "on_cpu.py"), "--base", *map(str, files)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            log, _ = process.communicate(timeout=60 * MINUTES)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, log
