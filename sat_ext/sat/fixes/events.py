"""TensorBoard's files on a disk that fills up."""

import argparse
from collections.abc import Callable
from typing import Any

from sat_ext.sat.side_files import side_file

NAME = "TensorBoard's events"


def events(args: argparse.Namespace) -> bool:
    """Symptom: a disk that is full ends the thread that writes TensorBoard's events, and ten values later the run
    hangs for ever, deaf to SIGTERM; at the start it ends in a traceback.
    """
    return True


def spared(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the writer's thread, which lives on after an error and writes no more."""

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


def or_none(get_sample_writer: Callable[..., Any]) -> Callable[..., Any]:
    """None where no file can be made: SAT then writes none."""

    def make(*arguments: Any, **options: Any) -> Any:
        with side_file(NAME):
            return get_sample_writer(*arguments, **options)
        return None

    return make


def or_unwritten(print_args: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """SAT prints the arguments into a file too."""

    def show(args: argparse.Namespace) -> None:
        with side_file("the list of arguments"):
            print_args(args)

    return show
