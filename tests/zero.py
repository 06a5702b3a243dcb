"""The files of configs/zero/."""

from pathlib import Path
from typing import Any

from sat_ext.config import read_yaml

FOLDER = Path(__file__).parent.parent / "configs" / "zero"


def zero_section(name: str) -> dict[str, Any]:
    """The section `deepspeed:` of `configs/zero/<name>.yaml`."""
    section: dict[str, Any] = read_yaml([str(FOLDER / f"{name}.yaml")])["deepspeed"]
    return section
