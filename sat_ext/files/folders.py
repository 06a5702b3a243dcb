"""Where the program keeps what it need not find out twice."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SAT_EXT_CACHE`, else `~/.cache/sat_ext`. It need not exist."""
    return Path(os.environ.get("SAT_EXT_CACHE") or Path("~/.cache/sat_ext").expanduser())
