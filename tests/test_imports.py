"""What imports what: no circles, nothing upward; and names in the tests' strings are those of something."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("pipeline", "marsinfer_cli")
    for path in (ROOT / folder).rglob("*.py")
}
# folders from the ground up: one may import only what stands below it
FLOORS = (
    "pipeline.kernels",
    "pipeline.pruning",
    "pipeline.settings",
    "pipeline.model",
    "pipeline.engines",
    "pipeline.quality",
    "pipeline.report",
    "marsinfer_cli",
)
ASIDE = {
    "pipeline.io": "pipeline.settings",
    "pipeline.bench": "pipeline.report",
    "pipeline.doctor": "pipeline.report",
}
DOTTED = re.compile(r"(pipeline|marsinfer_cli)(\.\w+)+")


def imported(path: Path) -> Iterator[str]:
    """Our modules that a file imports, also within functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from [name for name in (inner, node.module) if name in FILES][:1]


def room(module: str) -> str:
    """The folder of a module, or the module itself where it stands at the top of `pipeline`."""
    return ".".join(module.split(".")[: 2 if module.startswith("pipeline") else 1])


GRAPH = {name: set(imported(path)) - {name, "pipeline"} for name, path in FILES.items()}
ROOMS: dict[str, set[str]] = {}
for _name, _imports in GRAPH.items():
    ROOMS.setdefault(room(_name), set()).update({room(each) for each in _imports} - {room(_name)})


def below(name: str) -> set[str]:
    """All that a room reaches."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for each in ROOMS[waiting.pop()] - found:
            found.add(each)
            waiting.append(each)
    return found


def test_the_imports_were_read():
    assert "pipeline.io.journal" in GRAPH["pipeline.batch"]
    assert "pipeline.engines.ray_cluster" in GRAPH["pipeline.batch"]  # within a function
    assert set(FLOORS) | set(ASIDE) <= set(ROOMS)


@pytest.mark.parametrize("graph", [GRAPH, ROOMS], ids=["modules", "folders"])
def test_no_import_leads_back(graph):
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) >= set(graph)


@pytest.mark.parametrize("folder", [*FLOORS, *ASIDE])
def test_a_folder_imports_only_what_stands_below_it(folder):
    floor = FLOORS.index(ASIDE.get(folder, folder))
    above = set(FLOORS[floor + (folder in FLOORS) :]) - {folder}
    assert not below(folder) & above


def named() -> list[str]:
    """What tests name in strings, as `monkeypatch.setattr` takes it."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py"))
    texts = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return sorted(
        {text for text in texts if isinstance(text, str) and DOTTED.fullmatch(text)} - {"pipeline.py"}
    )


@pytest.mark.parametrize("name", named())
def test_what_a_test_names_is_there(name):
    parts = name.split(".")
    place = next(end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in FILES)
    pytest.importorskip("ray") if "ray" in name else None
    value = importlib.import_module(".".join(parts[:place]))
    for part in parts[place:]:
        value = getattr(value, part)
