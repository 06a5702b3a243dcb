from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from sat_ext.errors import ConfigError
from sat_ext.models.config import load_model_config
from sat_ext.models.text import T5Text, build_text, small_byt5
from tests.models.conftest import small_config

CPU = torch.device("cpu")


def test_text_length_and_width_follow_the_transformer() -> None:
    text = build_text(load_model_config(small_config("5b")), torch.float32)
    assert text.encode(["a"], CPU, torch.bfloat16).shape == (1, 8, 32)
    short = load_model_config(small_config("5b", text={"kind": "byt5", "max_length": 3}))
    assert build_text(short, torch.bfloat16).encode(["a"], CPU, torch.bfloat16).dtype == torch.bfloat16


def test_the_small_encoder_tells_the_last_letters_and_is_the_same_everywhere() -> None:
    torch.manual_seed(0)
    one = T5Text(small_byt5(64), ByT5Tokenizer(), 24)
    torch.manual_seed(1)
    other = T5Text(small_byt5(64), ByT5Tokenizer(), 24)
    captions = ["a red circle on black", "a blue circle on black", "a red square on white"]
    red, blue, square = one.encode(captions, CPU, torch.float32)
    assert torch.equal(red, other.encode(captions, CPU, torch.float32)[0])
    torch.testing.assert_close(
        red[4:6], square[4:6], atol=1e-3, rtol=1e-2
    )  # the end of "red ", whatever comes after
    assert (red[4] - blue[4]).norm() > 0.5 * red[4].norm()
    assert not any(p.requires_grad for p in one.parameters())


def test_t5_pads_and_cuts_to_the_length(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"})
    text = build_text(config, torch.float32)
    assert isinstance(text, T5Text)
    embeddings = text.encode(["ab", "a caption of more than eight bytes"], CPU, torch.float32)
    assert embeddings.shape == (2, 8, 32)
    expected = text.encoder(
        text.tokenizer("ab", padding="max_length", max_length=8, return_tensors="pt").input_ids
    )
    torch.testing.assert_close(embeddings[:1], expected[0])


def test_t5_never_drops_units(pretrained: Callable[..., Path]) -> None:
    config = load_model_config({"pretrained": str(pretrained()), "conditioning": "i2v"})
    text = build_text(config, torch.float32).train()
    assert torch.equal(text.encode(["ab"], CPU, torch.float32), text.encode(["ab"], CPU, torch.float32))


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_missing_text_parts_are_named(pretrained: Callable[..., Path], tmp_path: Path, part: str) -> None:
    shutil.copytree(pretrained(), tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    config = load_model_config({"pretrained": str(tmp_path / "model"), "conditioning": "i2v"})
    with pytest.raises(ConfigError, match=rf"model\.pretrained: .*model has no {part}/"):
        build_text(config, torch.float32)
