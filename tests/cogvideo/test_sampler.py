"""Evaluations of 1.5 models: odd numbers of latent frames and `ofs`, beside a double of CogVideo's sampler."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from sat_ext.cogvideo import PaddedSampler
from sat_ext.errors import ConfigError


class Sampler:
    """The interface of CogVideo's: what it is called with is kept, and the noise is the result."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def __call__(
        self, denoiser: Any, x: Tensor, cond: Any, uc: Any = None, num_steps: Any = None, scale: Any = None,
        scale_emb: Any = None, ofs: Any = None,
    ) -> Tensor:  # fmt: skip
        self.seen = {"x": x, "cond": cond, "uc": uc, "ofs": ofs, "scale": scale}
        return x


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("double_of_sampling")
    module.Sampler = Sampler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "double_of_sampling", module)
    return PaddedSampler(parent="double_of_sampling.Sampler", num_steps=50)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_an_evaluation_is_padded_as_in_training_and_one_frame_longer_for_the_engine_to_drop(
    sampler: Any, frames: int
) -> None:
    x, image = torch.randn(2, frames, 16, 4, 6), torch.randn(2, frames, 16, 4, 6)
    image[:, 1:] = 0
    cond = {"crossattn": torch.randn(2, 7, 8), "concat": image}
    latents = sampler(None, x, cond, uc=dict(cond), scale=3)
    assert torch.equal(latents[:, 1:], x)  # main's `decode_first_stage` drops the first
    seen = sampler.seen
    assert seen["x"].shape[1] == frames + frames % 2
    assert torch.equal(seen["cond"]["concat"][:, 0], image[:, 0])  # the condition's frame stays in front
    assert seen["cond"]["concat"].shape == seen["uc"]["concat"].shape == seen["x"].shape
    assert seen["ofs"].tolist() == [2.0]
    assert seen["scale"] == 3
    assert cond["concat"] is image


def test_the_condition_is_sampled_at_the_scale_at_which_it_is_trained() -> None:
    sampler: Any = PaddedSampler(parent=f"{__name__}.Sampler", num_steps=50, condition_scale=1.0)
    x, image = torch.zeros(1, 4, 16, 4, 6), torch.randn(1, 4, 16, 4, 6)
    cond = {"concat": 0.7 * image}  # as `log_video` makes it
    sampler(None, x, cond, uc=cond)
    for given in ("cond", "uc"):
        torch.testing.assert_close(sampler.seen[given]["concat"], image)
    sampler(None, x, cond, ofs=torch.tensor([2.0]))  # sample_video.py has scaled it itself
    assert sampler.seen["cond"] is cond
    with pytest.raises(ConfigError, match=r"sampler_config\.params\.condition_scale: 0\.0 is not a scale; give a"):
        PaddedSampler(parent=f"{__name__}.Sampler", num_steps=50, condition_scale=0)


def test_an_even_number_with_an_ofs_is_the_parents(sampler: Any) -> None:
    x, cond, ofs = torch.randn(1, 22, 16, 4, 6), {"crossattn": torch.randn(1, 7, 8)}, torch.tensor([1.0])
    state = torch.get_rng_state()
    assert torch.equal(sampler(None, x, cond, ofs=ofs), x)
    assert sampler.seen["x"] is x
    assert sampler.seen["cond"] is cond
    assert sampler.seen["uc"] is None
    assert sampler.seen["ofs"] is ofs
    assert torch.equal(torch.get_rng_state(), state)
    assert sampler.num_steps == 50
    assert isinstance(sampler, Sampler)


def test_a_parent_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sampler_config\.params\.parent: nowhere\.Sampler cannot be imported"):
        PaddedSampler(parent="nowhere.Sampler")
