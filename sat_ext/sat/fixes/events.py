"""TensorBoard's files on a disk that fills up."""

from __future__ import annotations

import argparse
from typing import Any

from sat_ext.sat.side_files import side_file

NAME = "TensorBoard's events"


def events(args: argparse.Namespace) -> bool:
    """Symptom: a disk that is full ends the thread that writes TensorBoard's events, and ten values later the run
    hangs for ever, deaf to SIGTERM; at the start it ends in a traceback.

    The thread lives on, and writes no more.
    """
    from sat.training import deepspeed_training
    from tensorboardX.event_file_writer import EventsWriter

    def guarded(method: Any) -> Any:
        def call(self: Any, *arguments: Any) -> Any:
            if not getattr(self, "sat_ext_ended", False):
                # what a failed write left may be half a value, behind which nothing could be read
                self.sat_ext_ended = True
                with side_file(NAME):
                    result = method(self, *arguments)
                    self.sat_ext_ended = False
                    return result
            return None

        return call

    for name in ("write_event", "flush", "close"):
        setattr(EventsWriter, name, guarded(getattr(EventsWriter, name)))
    make, show = deepspeed_training.get_sample_writer, deepspeed_training.print_args

    def get_sample_writer(*arguments: Any, **options: Any) -> Any:
        with side_file(NAME):
            return make(*arguments, **options)
        return None  # SAT then writes none

    def print_args(args: argparse.Namespace) -> None:
        with side_file("the list of arguments"):
            show(args)

    deepspeed_training.get_sample_writer, deepspeed_training.print_args = get_sample_writer, print_args
    return True
