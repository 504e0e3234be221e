"""Reading JSON lines, plain or compressed, one line in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import pyarrow as pa

from pipeline.inputs.columns import Columns, lacking_field
from pipeline.inputs.finding import InputFile
from pipeline.inputs.lines import BOM, bounded_lines, check_magic, open_lines
from pipeline.inputs.readers import Reader
from pipeline.inputs.rows import build, failed, json_type, or_error, rest_lost, until_fault
from pipeline.records import Record, Row, RowError
from pipeline.storage.sniff import CR_ENDS
from pipeline.storage.stdin import Stdin
from pipeline.values.jsonvalues import parse_json

LINES_TRIED = 100  # for the columns


class JsonlReader(Reader):
    """One file of JSON lines; how many lines it has is known only at its end."""

    def __init__(self, file: InputFile) -> None:
        super().__init__(file)
        if file.compression is not None and file.path.is_file():
            check_magic(file)

    def use(self, columns: Columns) -> None:
        """Refuses a file of whose first rows none has a column that the prompt template writes."""
        super().use(columns)
        if not columns.fields or not self.file.path.is_file():
            return
        with open_lines(self.file) as (_, stream):
            objects = list(_objects(line for line in bounded_lines(stream) if isinstance(line, bytes)))
        names = dict.fromkeys(name for each in (self.file.partitions, *objects) for name in each)
        for name in columns.fields:
            if objects and name not in names:
                raise lacking_field(self.file.label, name, names)

    def columns_told(self) -> dict[str, str] | None:
        """The keys of the first object; of what can be read only once, if it has come already."""
        path = self.file.path
        if isinstance(path, Stdin):
            line = path.first_line()
            return None if line is None else _keys([line])
        if not path.is_file():  # a named pipe
            return None
        with open_lines(self.file) as (_, stream):
            return _keys(line for line in bounded_lines(stream) if isinstance(line, bytes))

    def _records(self) -> Iterator[Record]:
        """The records of all lines but blank ones."""
        for index, line in enumerate(until_fault(self._lines())):
            row = replace(self.place(index), place=f"{self.file.label} line {index + 1}")
            if isinstance(line, bytes):
                if line.strip():
                    yield self._record(line, row)
            elif line.kind == "unreadable":
                yield rest_lost(row, line)
            else:
                yield failed(row, line.kind, str(line))
            self.rows_read = index + 1

    def _record(self, line: bytes, row: Row) -> Record:
        try:
            cells = {**self.file.partitions, **_parse(line)}
        except RowError as error:
            is_fault = not line.endswith(b"\n")  # where the file may be cut
            return failed(row, error.kind, str(error), is_fault=is_fault)
        return build(self._columns, row, cells, or_error(self._plan.of_object, cells))

    def _lines(self) -> Iterator[bytes | RowError]:
        """Lines without a mark at their beginning, also midway, where files were joined."""
        with open_lines(self.file) as (raw, stream):
            for line in bounded_lines(stream, self._columns.longest_line):
                if self.file.size:
                    self.fraction = min(raw.tell() / self.file.size, 1.0)
                yield line.removeprefix(BOM) if isinstance(line, bytes) else line


def _parse(line: bytes) -> dict[str, object]:
    try:
        row = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(
            "bad_utf8", f"is not valid UTF-8 at byte {error.start}; convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        ends = error.msg == "Extra data" and error.doc[error.pos - 1] == "\r"
        hint = f"; the file {CR_ENDS}" if ends else ""
        raise RowError("bad_json", f"is not JSON: {error.msg} at character {error.pos + 1}{hint}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        raise RowError("bad_json", f"cannot be read as JSON: {reason}") from None
    if not isinstance(row, dict):
        raise RowError(
            "not_an_object", f"is {json_type(row)}, not an object; each line must be one JSON object"
        )
    return row


def _keys(lines: Iterable[bytes]) -> dict[str, str] | None:
    first = next(_objects(lines), None)
    return None if first is None else {key: type_of(value) for key, value in first.items()}


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, object]]:
    """Those of the first lines that are objects."""
    for line in islice(lines, LINES_TRIED):
        try:
            row = json.loads(line.removeprefix(BOM).decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def type_of(value: object) -> str:
    try:
        return str(pa.infer_type([value]))
    except (pa.ArrowException, ValueError, OverflowError, TypeError):
        return "null"
