"""Packs: within their budget, nearly full, and with each kind's share in order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat_ext.cogvideox import SequenceShape, tokens
from sat_ext.data.packing import pack
from sat_ext.types import Bucket

CLIP, STILL = 17776, 1576  # tokens of 49 frames and of one, 480x720


@given(st.dictionaries(st.integers(50, 5000), st.integers(1, 200), min_size=1, max_size=8), st.floats(1, 6))
@settings(deadline=None, max_examples=60)
def test_all_slots_are_packed_within_the_budget(slots: dict[int, int], room: float) -> None:
    sizes = sorted(slots, reverse=True)
    budget = int(max(sizes) * room)
    packs = pack([slots[s] for s in sizes], sizes, budget)
    assert packs.sum(0).tolist() == [slots[s] for s in sizes]
    assert (packs.sum(1) > 0).all()
    assert (packs @ np.array(sizes) <= budget).all()


def test_a_clip_shares_each_pack_with_its_still() -> None:
    packs = pack([512, 512], [CLIP, STILL], CLIP + STILL)
    assert packs.tolist() == [[1, 1]] * 512


@pytest.mark.parametrize(
    ("lengths", "slots", "full"),
    [
        ([49, 33, 17, 1], [220, 152, 140, 512], 0.97),
        ([49, 41, 33, 25, 17, 9, 1], [85, 85, 85, 85, 85, 85, 510], 0.96),
        ([49, 1], [205, 819], 0.98),
    ],
)
def test_packs_are_full_and_keep_the_mix(lengths: list[int], slots: list[int], full: float) -> None:
    sizes = [tokens(Bucket(frames=n, height=480, width=720), SequenceShape()) for n in lengths]
    packs = pack(slots, sizes, sizes[0] + sizes[-1])
    assert (packs @ np.array(sizes)).mean() / (sizes[0] + sizes[-1]) >= full
    share = np.array(slots) / sum(slots)
    off = packs.cumsum(0) - packs.cumsum(0).sum(1, keepdims=True) * share
    assert np.ptp(off, axis=0).max() <= 3  # samples, over any stretch of packs
