"""Evaluations of CogVideo's under ZeRO-3: where one rank samples, all must."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from sat_ext.engines import engine_of
from sat_ext.sat.standin import replaced
from sat_ext.zero import zero_of


def zero3_sampling(args: argparse.Namespace) -> bool:
    """Symptom: under ZeRO-3, an evaluation of CogVideo's hangs: its first rank alone samples videos, and waits for
    the others' parts of the weights.

    Every rank samples its own batch; the script has the first rank alone write videos. It asks once for the
    rank that it is, between taking the batch and the loss, and gets the first's number there. The captions of
    the others, which it would write into the same file, are not written.
    """
    engine = engine_of(getattr(args, "model_config", None))
    is_whole = getattr(args, "model_parallel_size", 1) == 1
    return zero_of(args).get("stage") == 3 and engine.samples_on_first_rank and is_whole


def as_first_rank(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """An evaluation whose steps all take themselves for the first rank's."""

    def evaluate_as_first(*arguments: Any, hooks: dict[str, Any], **options: Any) -> Any:
        hooks = {**hooks, "forward_step_eval": _as_first_rank(hooks["forward_step_eval"])}
        return evaluate(*arguments, hooks=hooks, **options)

    return evaluate_as_first


def _as_first_rank(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    from sat import mpu

    def step(data: Iterator[Any], *rest: Any, **options: Any) -> Any:
        batch = next(data)  # SAT's loader asks for the rank too, and must get the true one
        rank, script = mpu.get_data_parallel_rank, sys.modules["__main__"]

        def first() -> int:
            mpu.get_data_parallel_rank = rank
            return 0

        with ExitStack() as stack:
            if hasattr(script, "save_texts") and rank() != 0:
                stack.enter_context(replaced(script, "save_texts", lambda *texts: None))
            stack.enter_context(replaced(mpu, "get_data_parallel_rank", first))
            return forward_step(iter([batch]), *rest, **options)

    return step
