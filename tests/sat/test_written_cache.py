"""A cache and an index of the first release with them, committed in `tests/written/cache`, are still read.

`sat-ext cache` wrote them for `engine.yaml` and `cogvideo.yaml`: a still, and two draws of a clip's 5 frames.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sat_ext.data.index import build_index
from sat_ext.data.params import DataConfig
from sat_ext.data.sources import SourceConfig
from sat_ext.engines import engine_of
from tests.sat.ranks import Server
from tests.sat.runs import MODEL
from tests.sat.test_cache import run_cache

WRITTEN = Path(__file__).parents[1] / "written" / "cache"
SECONDS = 1_700_000_000  # of the media's last change, which a checkout does not keep


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A copy with the files' times of then."""
    folder = Path(shutil.copytree(WRITTEN, tmp_path / "written"))
    for file in (folder / "media").glob("*.*"):
        os.utime(file, ns=(0, SECONDS * 10**9))
    return folder


def write_run(written: Path, name: str) -> list[str]:
    config: dict[str, Any] = yaml.safe_load((written / f"{name}.yaml").read_text())
    config["data"]["params"]["sources"][0]["path"] = str(written / "media")
    if name == "cogvideo":
        (embedder,) = config["model"]["conditioner_config"]["params"]["emb_models"]
        embedder["params"]["model_dir"] = str(written / "t5")
    file = written / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["--base", str(file)]


def tensors_of(cache: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in cache.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["engine", "cogvideo"])
def test_a_cache_of_then_lacks_nothing(name: str, server: Server, written: Path) -> None:
    """So names, times, crops and encoders have the fingerprints that they had."""
    facts = run_cache(server, write_run(written, name), written / name)
    assert (facts["samples"], facts["encoded"], facts["captions_encoded"], facts["bad"]) == (3, 0, 0, [])


@pytest.mark.multiprocess
def test_a_cache_of_now_holds_what_one_of_then_does(server: Server, written: Path, tmp_path: Path) -> None:
    run_cache(server, write_run(written, "engine"), tmp_path / "cache")
    then, now = tensors_of(written / "engine"), tensors_of(tmp_path / "cache")
    assert then.keys() == now.keys()
    for key, tensor in then.items():
        torch.testing.assert_close(now[key], tensor, atol=1e-5, rtol=1e-5)


def test_an_index_of_then_is_read_without_probing(written: Path) -> None:
    def probing(outcomes: Iterable[Any], total: int) -> Iterable[Any]:
        assert total == 0, f"{total} files are probed"
        return outcomes

    config = DataConfig(video_size=[32, 32], max_num_frames=5)
    index = build_index([SourceConfig(path=str(written / "media"), name="all")], config, probing=probing)
    assert sorted(index.table.column("key").to_pylist()) == ["clip.mp4", "still.png"]


def test_an_autoencoder_has_the_fingerprint_of_then() -> None:
    """Of its weights (here random ones), its options and the dtype: another default makes every cache stale."""
    found = engine_of(MODEL | {"first_stage": {"kind": "autoencoder"}}).fingerprints(torch.bfloat16)
    assert found.first_stage == "5becc223f1b038b160e6581442a9942c"
    assert found.text == {"encoder": "byt5", "width": "16", "dtype": "bfloat16", "max_length": "16"}
