from __future__ import annotations

import pytest
import torch

from sat_ext.data.stream import collate
from sat_ext.types import Sample


def sample(frames: int = 5, value: int | None = None, key: str = "a.mp4", **changes) -> Sample:
    shape = (frames, 3, 16, 32)
    pixels = torch.arange(frames * 3 * 16 * 32).remainder(256).to(torch.uint8).view(shape)
    if value is not None:
        pixels = torch.full(shape, value, dtype=torch.uint8)
    given = {
        "pixels": pixels,
        "caption": f"caption of {key}",
        "num_frames": frames,
        "fps": 8,
        "kind": "video",
        "source": "clips",
        "key": key,
    }
    return Sample(**(given | changes))


def test_the_batch_has_the_agreed_keys_shapes_and_types():
    batch = collate([sample(num_frames=3), sample(key="b.mp4", fps=12)], torch.float32)
    assert list(batch) == ["mp4", "txt", "num_frames", "fps", "kind", "source", "key"]
    assert batch["mp4"].shape == (2, 5, 3, 16, 32) and batch["mp4"].is_contiguous()
    assert batch["num_frames"].dtype == batch["fps"].dtype == torch.int64
    assert batch["num_frames"].tolist() == [3, 5] and batch["fps"].tolist() == [8, 12]
    assert batch["txt"] == ["caption of a.mp4", "caption of b.mp4"]
    assert (batch["kind"], batch["source"], batch["key"]) == (
        ["video"] * 2,
        ["clips"] * 2,
        ["a.mp4", "b.mp4"],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_become_minus_one_to_one_rounded_once(dtype):
    batch = collate([sample()], dtype)
    exact = sample().pixels.to(torch.float64) / 127.5 - 1
    assert batch["mp4"].dtype == dtype
    assert torch.equal(batch["mp4"][0], (sample().pixels.float() / 127.5 - 1).to(dtype))
    assert (batch["mp4"][0].double() - exact).abs().max() <= torch.finfo(dtype).eps / 2
    assert batch["mp4"].min() == -1 and batch["mp4"].max() == 1


def test_uint8_is_handed_over_as_decoded():
    samples = [sample(), sample(value=255)]
    batch = collate(samples, torch.uint8)
    assert batch["mp4"].dtype == torch.uint8 and batch["mp4"].shape == (2, 5, 3, 16, 32)
    assert torch.equal(batch["mp4"], torch.stack([s.pixels for s in samples])) and batch["mp4"].is_contiguous()
    before = batch["mp4"].clone()
    samples[0].pixels.zero_()  # the stages' memory is used again
    assert torch.equal(batch["mp4"], before)


def test_an_image_batch_has_one_frame():
    batch = collate([sample(frames=1, value=255, kind="image")], torch.bfloat16)
    assert batch["mp4"].shape == (1, 1, 3, 16, 32) and batch["kind"] == ["image"]
    assert batch["num_frames"].tolist() == [1] and (batch["mp4"] == 1).all()


def test_samples_of_several_shapes_are_a_fault_of_ours():
    with pytest.raises(AssertionError, match="several shapes"):
        collate([sample(5), sample(1)], torch.float32)
    with pytest.raises(AssertionError, match="no samples"):
        collate([], torch.float32)
