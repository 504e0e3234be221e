"""A document's text takes a short way from its file to the prompt: few files see it, few generators nest."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marsinfer_cli.app import run

PIPELINE = Path(__file__).parents[1] / "pipeline"
MARKERS = [f"Marked{number}Text8d2f" for number in range(3)]
MOST_FILES = 18
MOST_GENERATORS = 7
DEPTH = 3  # of dataclasses, collections and tables within each other


def holds(value: object, depth: int = DEPTH) -> bool:
    """Whether a text or bytes with a marker are within a value."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        return any(marker in value for marker in MARKERS)
    return depth > 0 and any(holds(each, depth - 1) for each in inside(value))


def inside(value: object) -> Iterable[object]:
    """What a dataclass, a collection or a table is made of."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, pa.Table | pa.RecordBatch):
        return value.to_pylist()
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in fields(value)]
    return ()


class Watch:
    """What the functions of `pipeline` are given and give while they run, in whatever thread."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.generators: list[str] = []  # the most that were running within each other

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(PIPELINE)):
            return
        if event == "call":
            running = [each.f_code.co_qualname for each in outward(frame) if is_generator(each)]
            self.generators = max(self.generators, running, key=len)
            count = code.co_argcount + code.co_kwonlyargcount
            value = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
        if holds(value, DEPTH + (event == "call")):
            self.files.add(str(Path(code.co_filename).relative_to(PIPELINE)))

    def __enter__(self) -> Watch:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_generator(frame: FrameType) -> bool:
    """One that hands rows on; context managers and generator expressions run only for a moment."""
    code, caller = frame.f_code, frame.f_back
    if code.co_name == "<genexpr>" or (caller and caller.f_code.co_filename == contextlib.__file__):
        return False
    return bool(code.co_flags & inspect.CO_GENERATOR) and code.co_filename.startswith(str(PIPELINE))


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_arrow(path: Path, rows: list[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture(scope="module", params=["jsonl", "parquet", "arrow"])
def watch(tmp_path_factory, request) -> Watch:
    """What was seen of a run over three rows."""
    folder = tmp_path_factory.mktemp("path")
    source = folder / f"in.{request.param}"
    write = {"jsonl": write_lines, "parquet": write_parquet, "arrow": write_arrow}[request.param]
    write(source, [{"text": f"A text. {marker}."} for marker in MARKERS])
    words = ["batch", str(source), str(folder / "out.jsonl"), "--question", "What is said?"]
    words += ["--model", "random:tiny", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "2"]
    with Watch() as watch:
        assert run(words) == 0
    return watch


def test_few_files_see_a_document(watch):
    assert "prompts/builder.py" in watch.files
    assert {"inputs/jsonl.py", "inputs/table_rows.py"} & watch.files
    assert len(watch.files) <= MOST_FILES, sorted(watch.files)


def test_few_generators_run_within_each_other(watch):
    assert 1 < len(watch.generators) <= MOST_GENERATORS, watch.generators
