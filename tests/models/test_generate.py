from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sat_ext.errors import ConfigError
from sat_ext.models.generate import generate
from tests.models.conftest import FAMILIES, Seen, make_engine, small_config

SIZE = {"height": 32, "width": 48}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_samples_have_the_asked_shape(family: str, frames: int, sampler: str) -> None:
    engine = make_engine(small_config(family, schedule={"sampler": sampler}))
    video = generate(
        engine, ["a", "b"], frames=frames, steps=3, generator=torch.Generator().manual_seed(0), **SIZE
    )
    assert video.shape == (2, frames, 3, 32, 48) and video.isfinite().all()
    assert video.min() >= -1 and video.max() <= 1


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
@pytest.mark.parametrize("family", ["5b", "1.5-5b"])
def test_samples_of_a_real_autoencoder_have_the_asked_frames(
    pretrained: Callable[..., Path], family: str, frames: int
) -> None:
    engine = make_engine({"pretrained": str(pretrained(family))})
    assert generate(engine, ["a"], frames=frames, height=16, width=32, steps=1).shape == (1, frames, 3, 16, 32)


def test_same_generator_same_sample() -> None:
    engine = make_engine(small_config("5b", schedule={"sampler": "dpm"}))
    one, same, other = (
        generate(engine, ["a"], frames=5, steps=2, generator=torch.Generator().manual_seed(seed), **SIZE)
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("family", ["5b-i2v", "1.5-5b-i2v"])
def test_first_frame_is_the_condition_with_and_without_caption(family: str) -> None:
    engine = make_engine(small_config(family))
    seen, first = Seen(engine), torch.rand(1, 3, 32, 48)
    generate(engine, ["a"], frames=9, first_frames=first, steps=2, **SIZE)
    expected = engine.first_stage.encode_condition(first[:, None])
    for call in range(4):  # two steps, each with the caption and with the empty one
        condition = seen.condition(call)
        torch.testing.assert_close(condition[:, :1], expected)
        assert not condition[:, 1:].any()


def test_without_first_frame_the_condition_is_zero() -> None:
    engine = make_engine(small_config("5b-i2v"))
    seen = Seen(engine)
    generate(engine, ["a"], frames=1, steps=1, **SIZE)
    assert not seen.condition().any()


def test_guidance_pushes_away_from_the_empty_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(small_config("5b"))
    empty = engine.text.encode([""], torch.device("cpu"), torch.float32)
    batches = []

    def predict(noisy: Tensor, text: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        batches.append(len(noisy))
        captioned = (text - empty).flatten(1).abs().gt(1e-5).any(dim=1).float()[:, None, None, None, None]
        return -(0.1 + 0.1 * captioned) * torch.ones_like(noisy)  # from pure noise, latents are minus velocity

    monkeypatch.setattr(engine, "predict", predict)
    monkeypatch.setattr(engine.first_stage, "decode", lambda latents: latents)
    guided = generate(engine, ["a"], frames=1, steps=1, guidance_scale=3.0, **SIZE)
    torch.testing.assert_close(guided, torch.full_like(guided, 0.1 + 3.0 * 0.1))
    plain = generate(engine, ["a"], frames=1, steps=1, guidance_scale=1.0, **SIZE)
    torch.testing.assert_close(plain, torch.full_like(plain, 0.2))
    assert batches == [1, 1, 1]  # with guidance in two passes


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_samplers_find_a_known_answer(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact velocity towards one set of latents, sampling must end there."""
    engine = make_engine(small_config("5b", schedule={"sampler": sampler}))
    answer = torch.randn(1, 2, 16, 4, 6, generator=torch.Generator().manual_seed(1))

    def predict(noisy: Tensor, text: Tensor, timesteps: Tensor, condition: Tensor | None) -> Tensor:
        signal = engine.schedule.root_signal[timesteps].reshape(-1, 1, 1, 1, 1)
        noise = engine.schedule.root_noise[timesteps].reshape(-1, 1, 1, 1, 1)
        return signal * (noisy - signal * answer) / noise - noise * answer

    monkeypatch.setattr(engine, "predict", predict)
    monkeypatch.setattr(engine.first_stage, "decode", lambda latents: latents)
    found = generate(engine, ["a"], frames=5, steps=20, guidance_scale=1.0, **SIZE)
    torch.testing.assert_close(found, answer, rtol=0, atol=1e-3)


def test_what_cannot_be_sampled_is_refused() -> None:
    first = torch.zeros(1, 3, 32, 48)
    with pytest.raises(ConfigError, match=r"6x32x48: frames must be 1 or 4k\+1; change 6 to 5"):
        generate(make_engine(small_config("5b")), ["a"], frames=6, **SIZE)
    with pytest.raises(ConfigError, match="this model is text-to-video; leave it out"):
        generate(make_engine(small_config("5b")), ["a"], frames=5, first_frames=first, **SIZE)
    with pytest.raises(ConfigError, match="frames is 1; ask for 5 frames or more"):
        generate(make_engine(small_config("5b-i2v")), ["a"], frames=1, first_frames=first, **SIZE)
