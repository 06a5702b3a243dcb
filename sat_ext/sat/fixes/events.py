"""TensorBoard's files on a disk that fills up."""

import argparse
from collections.abc import Callable
from typing import Any

from sat_ext.sat.side_files import side_file

NAME = "TensorBoard's events"


def events(_args: argparse.Namespace) -> bool:
    """Symptom: a full disk ends the thread that writes TensorBoard's events, and ten values later the run hangs
    for ever, deaf to SIGTERM; at the start it ends in a traceback.
    """
    return True


def until_it_fails(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the events writer that does nothing more after an error, so that its thread keeps emptying the
    queue that the training puts values into."""

    def call(self: Any, *arguments: Any) -> Any:
        if not getattr(self, "sat_ext_ended", False):
            # set before the write: one that failed may leave half a record, after which nothing could be read
            self.sat_ext_ended = True
            with side_file(NAME):
                result = method(self, *arguments)
                self.sat_ext_ended = False
                return result
        return None

    return call


def or_none(get_sample_writer: Callable[..., Any]) -> Callable[..., Any]:
    """None if the file cannot be made; SAT then writes no events."""

    def make(*arguments: Any, **options: Any) -> Any:
        with side_file(NAME):
            return get_sample_writer(*arguments, **options)
        return None

    return make


def or_unwritten(print_args: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """SAT also writes the arguments to a file, on the same disk."""

    def show(args: argparse.Namespace) -> None:
        with side_file("the list of arguments"):
            print_args(args)

    return show
