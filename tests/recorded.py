"""`train_video.py` as a launcher runs it (`-m tests.recorded`). Into the folder they are started in, ranks write
`probed<r>.txt`, the paths that they probe, and `rank<r>.jsonl`, what they train on (`tests.sat.ranks`)."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sat_ext.data.index.probing import Outcome, probe_files
from sat_ext.sat import probing
from tests.sat.ranks import ROOT, prepare


def recorded(paths: Iterable[str], **options: Any) -> Iterator[Outcome]:
    paths = list(paths)
    with open(f"probed{os.environ['RANK']}.txt", "a") as file:
        file.writelines(f"{path}\n" for path in paths)
    return probe_files(paths, **options)


if __name__ == "__main__":
    probing.probe_files = recorded
    prepare(Path(f"rank{os.environ['RANK']}.jsonl").absolute(), {})
    runpy.run_path(str(ROOT / "train_video.py"), run_name="__main__")
