from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sat_ext.errors import ConfigError
from sat_ext.models.config import check_bucket
from sat_ext.models.folder import load_model_config
from sat_ext.types import Bucket
from tests.models.conftest import FAMILIES, small_config


def test_module_imports_neither_torch_models_nor_diffusers() -> None:
    code = (
        "import sys, sat_ext.models.folder as c; "
        "c.load_model_config({'text': {'kind': 'byt5'}}); "
        "print([m for m in ('diffusers', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_key_names_place_and_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.train: unknown key 'rang'; did you mean 'rank'\?"):
        load_model_config(small_config("5b", train={"mode": "lora", "rang": 8}))
    with pytest.raises(ConfigError, match=r"model: unknown key 'conditionning'; did you mean 'conditioning'"):
        load_model_config({"conditionning": "i2v"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_dropout": 1.5}, r"model\.caption_dropout: 1\.5 is not a probability; use a value"),
        ({"text": {"kind": "t5"}}, r"model\.text\.kind: t5 needs a folder; set model\.pretrained"),
        ({"conditioning": "i2v"}, r"in_channels 16 .* do not fit conditioning 'i2v' .* it takes 32 and 16"),
    ],
)
def test_values_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model_config(small_config("5b", **changes))


def test_size_multiple_is_one_patch() -> None:
    assert load_model_config(small_config("5b")).size_multiple == 8 * 2
    full_size = {"text": {"kind": "byt5"}}  # the defaults are CogVideoX-2B's
    assert load_model_config(full_size).size_multiple == 16


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_frames_1_and_4k_plus_1_are_taken(family: str, frames: int) -> None:
    check_bucket(load_model_config(small_config(family)), Bucket(frames=frames, height=48, width=32))


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        (
            Bucket(frames=1, height=36, width=32),
            r"1x36x32: .* multiples of 16 pixels; change the height 36 to 32",
        ),
        (Bucket(frames=1, height=32, width=3), r"multiples of 16 pixels; change the width 3 to 16"),
        (Bucket(frames=8, height=32, width=32), r"8x32x32: frames must be 1 or 4k\+1; change 8 to 9"),
        (Bucket(frames=0, height=32, width=32), r"frames must be 1 or 4k\+1; change 0 to 1"),
    ],
)
def test_bucket_errors_name_the_remedy(bucket: Bucket, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_bucket(load_model_config(small_config("5b")), bucket)


def test_learned_positions_limit_the_frames() -> None:
    with pytest.raises(ConfigError, match=r"13x32x32: .* learned for 9 frames at most; change 13 to 9 or less"):
        check_bucket(load_model_config(small_config("5b-i2v")), Bucket(frames=13, height=32, width=32))
    check_bucket(load_model_config(small_config("5b")), Bucket(frames=13, height=32, width=32))


def test_pretrained_folder_gives_the_architecture(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained("5b-i2v")), "conditioning": "i2v"})
    assert config.transformer is not None and config.transformer.num_layers == 2
    assert config.first_stage.autoencoder.latent_channels == 4
    assert config.size_multiple == 16


def test_pretrained_errors_are_one_sentence(pretrained: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained: no folder /nowhere; give the path"):
        load_model_config({"pretrained": "/nowhere"})
    whole = pretrained("5b-i2v")
    shutil.copytree(whole / "transformer", tmp_path / "transformer")
    with pytest.raises(ConfigError, match=r"has no vae/config\.json; a diffusers model has transformer/, vae/"):
        load_model_config({"pretrained": str(tmp_path), "conditioning": "i2v"})
    with pytest.raises(ConfigError, match=r"first_stage\.kind 'cosine' and text\.kind 't5'; remove these"):
        load_model_config({"pretrained": str(whole), "first_stage": {"kind": "cosine"}})


def test_folder_of_another_model_is_refused(pretrained: Callable[..., Path]) -> None:
    folder = pretrained("5b-i2v")
    written = json.loads((folder / "transformer" / "config.json").read_text())
    expected = {key: written[key] for key in FAMILIES["5b-i2v"]["transformer"]}
    load_model_config({"pretrained": str(folder), "conditioning": "i2v", "transformer": expected})
    with pytest.raises(ConfigError, match=r"has num_layers 2, but model\.transformer\.num_layers is 42; use the"):
        load_model_config(
            {"pretrained": str(folder), "conditioning": "i2v", "transformer": {**expected, "num_layers": 42}}
        )
