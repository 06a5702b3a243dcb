"""Imports point downwards only (the layers of the design) and in no circle, and files stay short enough to read.

Packages count: who imports `data.index.build` imports `data` and `data.index`, which import what their `__init__`
does. Imports inside of functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
    ("media", 0),
    ("pixels", 0),
    ("motion", 0),
    ("cogvideox", 0),
    ("data.guard", 0),
    ("data.transform", 0),
    ("data.apportion", 0),
    ("data.packing", 0),
    ("data.permutation", 0),
    ("data.captions", 0),
    ("data.columns", 0),
    ("data.split", 0),
    ("data.mix", 2),
    ("data.timesteps", 2),
    ("data.stream", 3),
    ("data.held_out", 4),
    ("data.index", 2),
    ("data.params", 2),
    ("data.visits", 2),
    ("data", 1),
    ("config", 0),
    ("checkpoint", 0),
    ("zero", 1),
    ("latents.writer", 4),
    ("latents.encoders", 2),
    ("latents.reader", 3),
    ("latents", 0),
    ("contact_sheet", 1),
    ("demo_data", 1),
    ("demo_score", 2),
    ("models", 2),
    ("engines", 3),
    ("recipe", 3),
    ("convert", 3),
    ("cogvideo", 3),
    ("memory", 3),
    ("caption_lengths", 4),
    ("preview", 4),
    ("report", 4),
    ("starter", 4),
    ("sat", 4),
    ("cli", 5),
]
# Imports that point upwards, modules that import each other, and modules that do something when they are imported.
# Each is to go: what is listed and no longer occurs fails too.
UPWARDS: set[tuple[str, str]] = set()
CIRCLES: set[frozenset[str]] = set()
EFFECTS = {"data.guard", "media"}


def name_of(path: Path) -> str:
    """`data.index.build`, and for a package's `__init__` the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "sat_ext"


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> int:
    if module == "sat_ext":
        return 0
    return next(layer for prefix, layer in LAYERS if module == prefix or module.startswith(prefix + "."))


def stage_of(module: str) -> str:
    """A stage is a file or, where it has several, a folder: `data.sources.shards` belongs to `data.sources`."""
    return ".".join(module.split(".")[:2])


def imports_of(path: Path) -> Iterator[str]:
    """Full names; of `from a import b` the module `a.b`, or else `a.b` and `a`."""
    package = ["sat_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from names
            if not all(name.removeprefix("sat_ext.") in FILES for name in names):
                yield module
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def own_imports(module: str) -> set[str]:
    """The modules of ours that are run where `module` is: with each, the packages that it is in."""
    found: set[str] = set()
    for name in imports_of(FILES[module]):
        if name.split(".")[0] != "sat_ext":
            continue
        parts = name.split(".")[1:]
        found |= {other for n in range(len(parts)) if (other := ".".join(parts[: n + 1])) in FILES}
        if not parts:
            found.add("sat_ext")
    packages = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 1)}
    # a package is being imported where one of its modules is: its own is only run again when it is named itself
    named = {n.removeprefix("sat_ext.") for n in imports_of(FILES[module])}
    return found - (packages - named) - {module}


GRAPH = {module: own_imports(module) for module in FILES}


def points_upwards(module: str, other: str) -> bool:
    if layer_of(other) > layer_of(module):
        return True
    return layer_of(module) == layer_of(other) == 1 and stage_of(module) != stage_of(other)


def circles() -> set[frozenset[str]]:
    """Modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    found: set[frozenset[str]] = set()
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(GRAPH[module]):
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            start = stack.index(module)
            if len(stack) - start > 1:
                found.add(frozenset(stack[start:]))
            del stack[start:]

    for module in GRAPH:
        if module not in order:
            visit(module)
    return found


def test_imports_point_downwards() -> None:
    upwards = {(m, other) for m, others in GRAPH.items() for other in others if points_upwards(m, other)}
    assert sorted(upwards - UPWARDS) == [], "must not import the second"
    assert sorted(UPWARDS - upwards) == [], "no longer occurs: take it off the list"


def test_there_is_no_circle() -> None:
    found = circles()
    assert [sorted(c) for c in found - CIRCLES] == [], "import each other"
    assert [sorted(c) for c in CIRCLES - found] == [], "no longer occurs: take it off the list"


def test_nothing_happens_at_import() -> None:
    """No statement of a module calls something for what it does; the commands of the command line are declared."""
    calls = {
        module: [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        for module, file in FILES.items()
        if (tree := ast.parse(file.read_text(encoding="utf-8")))
    }
    calls = {m: [n for n in nodes if not ast.unparse(n).startswith("app.command(")] for m, nodes in calls.items()}
    found = {module for module, nodes in calls.items() if nodes}
    assert sorted(found - EFFECTS) == [], "call something"
    assert sorted(EFFECTS - found) == [], "no longer do: take them off the list"


@pytest.mark.parametrize("module", FILES)
def test_only_the_seam_imports_sat_and_deepspeed(module: str) -> None:
    roots = {name.split(".")[0] for name in imports_of(FILES[module])}
    if not module.startswith("sat."):
        assert not roots & ({"deepspeed"} if module == "cogvideo.loss" else {"sat", "deepspeed"})


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module: str) -> None:
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= 330
