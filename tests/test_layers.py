"""Imports point downwards only (the layers of the design), and files stay short enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sat_ext"
# The first matching prefix decides. Stages of layer 1 do not import each other.
LAYERS = [
    ("errors", 0),
    ("ranks", 0),
    ("types", 0),
    ("files", 0),
    ("colour", 0),
    ("checksums", 0),
    ("media", 0),
    ("pixels", 0),
    ("cogvideox", 0),
    ("data.guard", 0),
    ("data.stream", 3),
    ("data.held_out", 4),
    ("data.index", 2),
    ("data.params", 2),
    ("data", 1),
    ("config", 0),
    ("checkpoint", 0),
    ("zero", 1),
    ("latents.writer", 4),
    ("latents.reader", 2),
    ("latents", 0),
    ("contact_sheet", 1),
    ("demo_data", 1),
    ("models", 2),
    ("engines", 3),
    ("doubts", 3),
    ("recipe", 3),
    ("convert", 3),
    ("cogvideo", 3),
    ("memory", 3),
    ("preview", 4),
    ("sat", 4),
    ("cli", 5),
]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def layer_of(module: str) -> int:
    return next(layer for prefix, layer in LAYERS if module == prefix or module.startswith(prefix + "."))


def stage_of(module: str) -> str:
    """A stage is a file or, where it has several, a folder: `data.sources.shards` belongs to `data.sources`."""
    return ".".join(module.split(".")[:2])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n for n in names if n}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    module = name_of(path)
    own = {n.removeprefix("sat_ext.") for n in imports_of(path) if n.startswith("sat_ext.")}
    known = {name_of(p) for p in MODULES}
    for other in own & known:
        assert layer_of(other) <= layer_of(module), f"{module} must not import {other}"
        if layer_of(module) == 1 and stage_of(module) != stage_of(other):
            assert layer_of(other) == 0, f"{module} and {other} are siblings of layer 1"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_seam_imports_sat_and_deepspeed(path: Path) -> None:
    roots = {n.split(".")[0] for n in imports_of(path)}
    if not name_of(path).startswith("sat."):
        theirs = {"deepspeed"} if name_of(path) == "cogvideo.loss" else {"sat", "deepspeed"}
        assert not roots & theirs


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 330
