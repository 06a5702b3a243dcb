"""TensorBoard's files on a disk that fills up."""

import argparse
from collections.abc import Callable
from typing import Any

from sat_ext.sat.side_files import side_file

NAME = "TensorBoard's events"


def events(_args: argparse.Namespace) -> bool:
    """Symptom: a full disk ends the thread that writes TensorBoard's events, and ten values later the run hangs
    for ever, deaf to SIGTERM; at the start it ends in a traceback."""
    return True


def until_it_fails(method: Callable[..., Any], writer: Any, *arguments: Any) -> Any:
    """A method of the events writer that does nothing more after an error, so that its thread keeps emptying the
    queue that the training puts values into. One that failed may leave half a record, after which nothing could be
    read."""
    if not getattr(writer, "sat_ext_ended", False):
        with side_file(NAME):
            return method(writer, *arguments)
        writer.sat_ext_ended = True  # not before the write: another thread's flush must not make it skip a value
    return None


def or_none(get_sample_writer: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """None if the file cannot be made; SAT then writes no events."""
    with side_file(NAME):
        return get_sample_writer(*arguments, **options)
    return None


def or_unwritten(print_args: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """SAT also writes the arguments to a file, on the same disk."""
    with side_file("the list of arguments"):
        print_args(args)
