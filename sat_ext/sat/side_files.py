"""Files that a run writes beside its checkpoints. One that cannot be written does not end the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_side_file(folder: str | None, name: str, text: str, *, append: bool = False) -> None:
    """Write `name` in `folder`, that of `args.save`, if there is one."""
    if not folder:
        return
    with side_file(name):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with Path(folder, name).open("a" if append else "w", errors="backslashreplace") as file:
            file.write(text)
