"""Under ZeRO-3 every rank samples in an evaluation, as CogVideo's script has its first rank do."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pytest
from sat import mpu
from sat.training import deepspeed_training

from tests.sat.repairs import repair


def arguments(stage: int = 3, **changes: Any) -> Namespace:
    values = {"model_config": {"network_config": {}}, "deepspeed_config": {"zero_optimization": {"stage": stage}}}
    return Namespace(**{**values, **changes})


def test_every_rank_samples_and_has_its_own_number_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(mpu, "get_data_parallel_rank", lambda: 5)
    monkeypatch.setattr(deepspeed_training, "evaluate", lambda data, hooks: hooks["forward_step_eval"](data))
    assert repair("zero3_sampling", arguments())

    def batches() -> Iterator[int]:
        asked.append(mpu.get_data_parallel_rank())  # as SAT's loader does
        yield 7

    def forward_step(data: Iterator[int]) -> int:
        batch = next(data)
        asked.append(mpu.get_data_parallel_rank())  # whether to sample
        asked.append(mpu.get_data_parallel_rank())  # as CogVideo's loss does
        return batch

    assert deepspeed_training.evaluate(batches(), hooks={"forward_step_eval": forward_step}) == 7
    assert asked == [5, 0, 5]
    assert mpu.get_data_parallel_rank() == 5


def test_a_step_that_fails_leaves_the_rank_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpu, "get_data_parallel_rank", lambda: 5)
    monkeypatch.setattr(deepspeed_training, "evaluate", lambda data, hooks: hooks["forward_step_eval"](data))
    repair("zero3_sampling", arguments())

    def forward_step(data: Iterator[int]) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        deepspeed_training.evaluate(iter([1]), hooks={"forward_step_eval": forward_step})
    assert mpu.get_data_parallel_rank() == 5


@pytest.mark.parametrize(
    "args", [arguments(stage=2), arguments(model_config={}), arguments(model_parallel_size=2)]
)
def test_other_runs_are_left_alone(args: Namespace) -> None:
    before = deepspeed_training.evaluate
    assert not repair("zero3_sampling", args)
    assert deepspeed_training.evaluate is before
