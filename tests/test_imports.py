"""What imports what: no circles, nothing upward; and names in the tests' strings are those of something."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
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
# folders and modules of `pipeline` from the ground up: one may import only what stands on a lower floor
FLOORS = (
    "texts",
    "errors",
    "ranks",
    "interrupts kernels records storage",
    "pruning structured values",
    "outputs",
    "settings",
    "families inputs suites",
    "checkpoints prompts",
    "model",
    "generation",
    "setup",
    "engines",
    "evaluate tally",
    "summary",
    "notebooks",
    "bookkeeping checks merging report",
    "run",
    "in_memory",
    "bench",
    "calibration doctor estimate",
    "dryrun",
)
OUTSIDE = {"pipeline", "marsinfer_cli"}  # the names that programs import, and the commands
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


def test_the_imports_were_read():
    assert "pipeline.outputs.finished" in GRAPH["pipeline.run"]
    assert "pipeline.engines.ray_cluster" in GRAPH["pipeline.run"]  # within a function
    assert {f"pipeline.{each}" for floor in FLOORS for each in floor.split()} == set(ROOMS) - OUTSIDE


@pytest.mark.parametrize("graph", [GRAPH, ROOMS], ids=["modules", "folders"])
def test_no_import_leads_back(graph):
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert set(order) >= set(graph)


def test_what_is_imported_stands_on_a_lower_floor():
    floor = {f"pipeline.{each}": number for number, floor in enumerate(FLOORS) for each in floor.split()}
    upward = [
        f"{name} imports {each}"
        for name, imports in sorted(GRAPH.items())
        for each in sorted(imports)
        if room(name) != room(each) and room(name) not in OUTSIDE and floor[room(each)] >= floor[room(name)]
    ]
    assert upward == []


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in FILES.values()}), ids=lambda path: path.name
)
def test_no_folder_is_too_large_to_be_looked_through(folder):
    files = sorted(path.name for path in folder.glob("*.py") if path.name != "__init__.py")
    assert len(files) <= (12 if folder.name == "pipeline" else 25)


def test_no_name_of_a_file_stands_twice():
    counts = Counter(path.name for path in FILES.values() if path.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_name_of_a_class_stands_twice():
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in FILES.values())
    counts = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in counts.items() if count > 1] == []


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
