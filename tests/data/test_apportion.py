"""Whole numbers in given proportions: they add up, never fall, and are off by no more than is promised."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat_ext.data.apportion import Apportion

Leaf = tuple[float, tuple[int, int], float]
leaves = st.lists(
    st.tuples(st.floats(1e-4, 1), st.tuples(st.integers(0, 3), st.integers(0, 2)), st.floats(0, 500)),
    min_size=1,
    max_size=12,
)


@given(leaves, st.sampled_from([8, 64]), st.booleans(), st.data())
@settings(deadline=None, max_examples=60)
def test_counts_add_up_rise_by_one_at_a_time_and_stay_within_their_slack(
    given_leaves: list[Leaf], window: int, resumed: bool, data: st.DataObject
) -> None:
    weights, paths, used = (list(values) for values in zip(*given_leaves))
    split = Apportion(weights, paths, window=window, used=used if resumed else None)
    counts = [split.counts(total) for total in range(4 * window)]
    assert all(sum(c) == total for total, c in enumerate(counts))
    for before, after in pairwise(counts):
        assert sorted(b - a for a, b in zip(before, after)) == [0] * (len(weights) - 1) + [1]
    chosen = data.draw(st.lists(st.booleans(), min_size=len(weights), max_size=len(weights)))
    share = sum(w for w, c in zip(weights, chosen) if c) / sum(weights)
    together = [sum(n for n, c in zip(count, chosen) if c) for count in counts]
    slack = split.slack(chosen) + 1e-9
    assert all(abs(b - a - share * window) <= slack for a, b in zip(together, together[window:]))


def test_a_subtree_is_off_by_one_rounding_however_many_leaves_it_has() -> None:
    split = Apportion([1.0] * 40, [("a",)] * 30 + [("b",)] * 10, window=1000)
    assert split.slack([True] * 30 + [False] * 10) == 1
    assert split.slack([True] * 40) == 0
    for total in range(0, 4000, 7):
        assert abs(sum(split.counts(total)[:30]) - 0.75 * total) <= 0.5


@pytest.mark.parametrize("far", [10**6, 10**9])
def test_what_was_owed_is_made_up_for_slowly_and_then_exact(far: int) -> None:
    split = Apportion([1.0, 1.0], [("a",), ("b",)], window=100, used=[0.0, 40.0])
    a, b = split.counts(100)
    assert (a, b) == (51, 49)  # half of a count more in a window, and a rounding
    a, b = split.counts(far)
    assert a - b == 40
