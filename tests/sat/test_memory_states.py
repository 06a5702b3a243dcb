"""The planner's bytes of weights, gradients and optimizer against what DeepSpeed allocates on two CPU ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sat.memory_ranks import CASES, WORLD
from tests.sat.ranks import found_by

EXACT = (
    "weights", "gradients", "master", "moments", "persistent", "host_optimizer", "host_gradients", "host_weights",
)  # fmt: skip


@pytest.fixture(scope="module")
def allocated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    return found_by("tests.sat.memory_ranks", tmp_path_factory.mktemp("memory"), WORLD)


@pytest.mark.parametrize("case", ["-".join(map(str, case)) for case in CASES])
def test_predicted_to_the_byte(allocated: list[dict[str, Any]], case: str) -> None:
    for result in (ranks[case] for ranks in allocated):
        assert "error" not in result, result["error"]
        seen, predicted = dict(result["seen"]), result["predicted"]
        if case.endswith("-2"):  # gradients of two micro-steps
            # while the second's are added to the first's there are both (padding comes with the step)
            assert 0 <= predicted["gradients"] - seen["accumulating"] <= 6 * 4
            assert abs(predicted["gradients"] - 2 * seen["gradients"]) <= 6 * 4
            del seen["gradients"]
        compared = [name for name in EXACT if name in seen]
        assert len(compared) >= 3
        assert {n: seen[n] for n in compared} == {n: predicted[n] for n in compared}


def test_the_bucket_of_zero3_is_there_from_the_start(allocated: list[dict[str, Any]]) -> None:
    result = allocated[0]["zero3-full-2-1"]
    # and a second of its size, sorted by rank, while it is reduced
    assert result["seen"]["bucket"] * 2 == result["predicted"]["buffers"]
