"""Files of PDF, DOCX and HTML, each a row whose text is extracted in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.inputs.columns import with_arrays
from pipeline.inputs.finding import InputFile
from pipeline.inputs.readers import TextReader, long_line
from pipeline.inputs.rows import build, failed, or_error, read_fault
from pipeline.records import ErrorType, Record, Row, RowError
from pipeline.storage.causes import READ_ERRORS

PROGRAM = Path(__file__).with_name("extracting.py")
NEEDED = {"pdf": ("pypdf",), "docx": ("docx",), "html": ("bs4", "lxml")}  # libraries
CPU_S = 120  # of a file, which no load of the machine shortens
WALL_S = 15 * 60
MEMORY_BYTES = 4 << 30  # on top of five times the file
PAGES = pa.schema([pa.field("pages", pa.int32()), pa.field("pages_without_text", pa.int32())])


class DocumentReader(TextReader):
    """One document; of PDF the output has `pages`, and `pages_without_text`, which may be scans."""

    def __init__(self, file: InputFile) -> None:
        super().__init__(file)
        if not all(map(find_spec, NEEDED[file.format])):
            raise ConfigError(
                f"{file.path}: .{file.format} is read with libraries that are not installed; "
                "pip install 'marsinfer[documents]'"
            )
        if file.format == "pdf":
            self.schema = PAGES

    def _record(self, row: Row, longest: int) -> Record:
        try:
            with self.file.open() as file:
                content = file.read(longest + 1)
            found = _extracted(self.file.format, content, longest)
        except RowError as error:
            return failed(row, error.kind, str(error))
        except READ_ERRORS as error:
            return failed(row, "unreadable", f"cannot be read: {read_fault(error)}", is_fault=True)
        self.fraction = 1.0
        self.pages_without_text = found.get("pages_without_text", 0)
        if "fault" in found:
            return failed(row, cast(ErrorType, found["kind"]), found["fault"])
        text = found.pop("text")
        copied = or_error(self._plan.of_batch, with_arrays(_counts(found), self.file.partitions))
        return build(self._columns, row, {**self.file.partitions, self._columns.text: text}, copied)


def _counts(found: dict[str, Any]) -> pa.RecordBatch:
    """One row of what is counted in a document."""
    arrays = [pa.array([found.get(name)], pa.int32()) for name in PAGES.names]
    return pa.RecordBatch.from_arrays(arrays, schema=PAGES)


def _extracted(format: str, content: bytes, longest: int) -> dict[str, Any]:
    """What `extracting.py` writes of a file; raises `RowError` where it writes nothing."""
    if len(content) > longest:
        raise long_line(longest)
    bounds = longest, CPU_S, MEMORY_BYTES + 5 * len(content)
    words = [sys.executable, "-P", str(PROGRAM), format, *map(str, bounds)]
    try:
        done = subprocess.run(
            words,
            input=content,
            capture_output=True,
            timeout=WALL_S,
            process_group=0,  # a Ctrl-C is for the run: it would make this document an error row
        )
    except subprocess.TimeoutExpired:
        raise RowError("timeout", f"takes more than {WALL_S} s to read") from None
    if done.returncode == 0:
        return dict(json.loads(done.stdout))
    if -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        raise RowError("timeout", f"takes more than {CPU_S} s to read")
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["the reading of it crashed"]
    raise RowError("unreadable", f"cannot be read as {format.upper()}: {lines[-1][:200]}")
