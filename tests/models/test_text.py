from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sat_ext.errors import ConfigError
from sat_ext.models.config import load_model_config
from sat_ext.models.text import T5Text, WordText, build_text
from tests.models.conftest import small_config

CPU = torch.device("cpu")


def test_words_do_not_depend_on_what_was_seen_before() -> None:
    one, other = WordText(16, 4), WordText(16, 4)
    other.encode(["something else"], CPU, torch.float32)
    caption = ["A red circle."]
    assert torch.equal(one.encode(caption, CPU, torch.float32), other.encode(caption, CPU, torch.float32))


def test_each_word_has_its_own_vector_and_padding_is_zero() -> None:
    text = WordText(64, 4)
    red, blue, long = text.encode(["red", "blue", "blue one two three four"], CPU, torch.float32)
    assert abs(torch.cosine_similarity(red[0], blue[0], dim=0)) < 0.5
    assert torch.equal(blue[0], long[0]) and not red[1:].any() and long.any(dim=1).all()
    assert not text.encode([""], CPU, torch.float32).any()


def test_text_length_and_width_follow_the_transformer() -> None:
    text = build_text(load_model_config(small_config("5b")), torch.float32)
    assert text.encode(["a"], CPU, torch.bfloat16).shape == (1, 8, 32)
    text = build_text(
        load_model_config(small_config("5b", text={"kind": "words", "max_length": 3})), torch.float32
    )
    assert text.encode(["a"], CPU, torch.bfloat16).dtype == torch.bfloat16


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
