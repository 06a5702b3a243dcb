"""How long a part of a step takes, without making a GPU wait."""

import time
from typing import Any

import torch


class Stopwatch:
    """A context manager that adds up the seconds of its blocks, those of a GPU by its own events."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._begun = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._begun

    def take(self) -> float:
        """The seconds since the last call. Waits for the GPU."""
        seconds, self._seconds, events, self._events = self._seconds, 0.0, self._events, []
        for begin, end in events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        return seconds
