from __future__ import annotations

import torch

from sat_ext.pixels import to_model_range, to_uint8

EVERY_VALUE = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)


def test_range_is_minus_one_to_one_and_rounded_once() -> None:
    exact = EVERY_VALUE.double() / 127.5 - 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = to_model_range(EVERY_VALUE, dtype)
        assert made.dtype == dtype and made.min() == -1 and made.max() == 1
        assert torch.equal(made, exact.to(torch.float32).to(dtype)) or dtype == torch.float32
        torch.testing.assert_close(made.double(), exact, atol=2e-7 if dtype == torch.float32 else 4e-3, rtol=0)


def test_every_value_survives_the_way_there_and_back() -> None:
    back = to_uint8(to_model_range(EVERY_VALUE, torch.float32))
    assert (back == EVERY_VALUE.permute(0, 2, 3, 1).numpy()).all()
    assert (to_uint8(EVERY_VALUE) == back).all()
