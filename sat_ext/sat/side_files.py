"""Files that a run writes beside its checkpoints. One that cannot be written does not end the run."""

from collections.abc import Iterator
from contextlib import contextmanager

from sat.helpers import print_rank0

_missed: set[str] = set()


@contextmanager
def side_file(name: str) -> Iterator[None]:
    """A block that writes `name`: an `OSError` in it becomes a warning, the first time."""
    try:
        yield
    except OSError as error:
        if name not in _missed:
            _missed.add(name)
            print_rank0(
                f"warning: {name} cannot be written ({error.strerror or error}); training continues without it.",
                level="WARNING",
            )
