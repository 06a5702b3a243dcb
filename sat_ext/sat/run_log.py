"""What a run writes down of itself, for `sat-ext report`, beside TensorBoard's events.

- `steps.jsonl`: a line for each start, and one at every `args.log_interval`, with samples, tokens and seconds.
- `skipped.jsonl`: files that could not be read during training, and on which rank.
- `data.json`: the records by source and bucket, and the files that were left out at the start."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import repeat
from typing import Any

from sat import mpu

from sat_ext.cogvideox import tokens
from sat_ext.data.stream import JointStream
from sat_ext.ranks import rank_and_world
from sat_ext.sat.memory_report import bucket_of
from sat_ext.sat.run import RunState
from sat_ext.sat.side_files import write_side_file
from sat_ext.types import groups_of

STEPS, SKIPPED, DATA = "steps.jsonl", "skipped.jsonl", "data.json"
MOST_FILES = 1000  # of each kind, in `data.json`


class RunLog:
    """Counts what this rank trains on, and writes the files in `args.save`."""

    def __init__(self, run: RunState, args: argparse.Namespace) -> None:
        self.run, self.args = run, args
        self.first = rank_and_world()[0] == 0
        self.samples = self.tokens = 0
        self._skipped, self._waited = 0, 0.0
        stream = run.streams.get("train_data", [None])[0]
        self.stream: JointStream | None = stream if isinstance(stream, JointStream) else None
        if self.first:
            start = {"start": args.iteration, "time": time.time(), "world": rank_and_world()[1]}
            events = os.path.join(args.summary_dir or "", "runs", args.experiment_name)  # SAT's get_sample_writer
            where = os.path.relpath(events, args.save) if args.save else events
            self._append(STEPS, {**start, "train_iters": args.train_iters, "events": where})
            self._write_data()

    def seeing(self, data: Iterator[Any] | None) -> Iterator[Any] | None:
        """`data`, whose batches are counted. None, on a rank that gets its batches from another, stays None."""
        return None if data is None else map(self._next, repeat(data))

    def _next(self, data: Iterator[Any]) -> Any:
        begun = time.perf_counter()
        batch = next(data)
        self._waited += time.perf_counter() - begun
        if (recipe := self.run.recipe) is not None:
            for group in groups_of(batch):
                self.samples += len(group["txt"])
                self.tokens += len(group["txt"]) * tokens(bucket_of(group), recipe.shape)
        return batch

    def after_step(self, timers: Any, engine: Any) -> None:
        """Write a line if SAT logs after this step, whose timers add up since it did so last."""
        if (self.args.iteration + 1) % self.args.log_interval:
            return
        self._write_skipped()
        encoding = getattr(engine, "encoding", None)
        encode = encoding.take() if encoding is not None else None
        if not self.first:
            return
        of = {name: timers(name).elapsed_ for name in ("forward", "backward", "optimizer")}
        seconds = {
            "data": self._waited,  # SAT's own timer counts what evaluations wait, too
            **({} if encode is None else {"encode": encode}),
            "forward": max(0.0, of["forward"] - self._waited - (encode or 0.0)),
            "backward": of["backward"],
            "optimizer": of["optimizer"],
        }
        ranks = mpu.get_data_parallel_world_size()
        row = {"samples": self.samples * ranks, "tokens": self.tokens * ranks, "steps": self.args.log_interval}
        self.samples, self.tokens, self._waited = 0, 0, 0.0
        seconds = {name: round(value, 4) for name, value in seconds.items()}
        self._append(STEPS, {"iteration": self.args.iteration + 1, "time": time.time(), **row, "seconds": seconds})

    def _write_skipped(self) -> None:
        found = self.stream.skipped() if self.stream is not None else []
        for path, reason in found[self._skipped :]:
            row = {"iteration": self.args.iteration + 1, "rank": rank_and_world()[0]}
            self._append(SKIPPED, {**row, "path": path, "reason": reason})
        self._skipped = len(found)

    def _write_data(self) -> None:
        if self.stream is None:
            return
        index = self.stream.index
        left_out = index.left_out.slice(0, MOST_FILES)
        facts = {
            "records": [[g.source, str(g.bucket), len(g.rows)] for g in index.groups],
            "bad": [len(index.bad), list(index.bad[:MOST_FILES])],
            "dropped": [index.left_out.num_rows, [[*row.values()] for row in left_out.to_pylist()]],
            "unread": dict(index.unread),
        }
        write_side_file(self.args.save, DATA, json.dumps(facts) + "\n")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        write_side_file(self.args.save, name, json.dumps(row) + "\n", append=True)
