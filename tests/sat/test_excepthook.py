"""What the terminal shows of an error under a script that is not ours."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from functools import partial
from sat_ext.errors import DataError, MediaError
from sat_ext.sat.excepthook import in_a_sentence
from torch.utils.data import DataLoader, IterableDataset

class Stream(IterableDataset):
    def __iter__(self):
        yield from ()
        raise DataError("the folder\\nis empty; name another.")

if __name__ == "__main__":
    sys.excepthook = partial(in_a_sentence, sys.excepthook)
    sys.excepthook = partial(in_a_sentence, sys.excepthook)
    {end}
"""


def run(end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(end=end)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "end",
    [
        'raise DataError("the folder\\nis empty; name another.")',
        "list(DataLoader(Stream(), batch_size=None, num_workers=1))",
    ],
    ids=["here", "in a data worker"],
)
def test_a_users_error_is_one_sentence(end: str) -> None:
    ended = run(end)
    assert (ended.returncode, ended.stderr) == (1, "error: the folder\nis empty; name another.\n")


def test_any_other_error_keeps_its_traceback() -> None:
    ended = run('raise RuntimeError("shapes do not fit")')
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.endswith("RuntimeError: shapes do not fit\n")
