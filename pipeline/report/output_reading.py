"""The rows of a run as it stands: a finished output, or the journal of one that is under way or was stopped.

Reading takes no lock and changes nothing. A journal stands for its run, with the finished output that it
extends, if it does: what a resumed run would go on from.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import ConfigError, StorageError
from pipeline.inputs.passthrough import EXTRA
from pipeline.outputs.answers import (
    LATER_NAMES,
    QUESTION_NAME,
    TYPES,
    lacking_told,
    own_columns,
    stored_in,
)
from pipeline.outputs.batch_lines import errors_path, is_of_requests, names_told
from pipeline.outputs.beginnings import METADATA_KEY, STATE_FILE, Beginning
from pipeline.outputs.chunks import Damage, whole_chunks
from pipeline.outputs.formats import SINKS
from pipeline.outputs.layout import layout_in
from pipeline.outputs.mirror import Mirror
from pipeline.outputs.own_columns import ANSWERS, CHOSEN_FROM, STATS, own_prefix
from pipeline.outputs.parts import damage_told, journal_folder, journal_parts
from pipeline.outputs.published import Published
from pipeline.outputs.rowindex import DUPLICATE, row_key
from pipeline.outputs.sidecar import needs_sidecar, sidecar_path
from pipeline.report.references import REFERENCE, holder, references_in
from pipeline.report.references import TYPE as REFERENCES
from pipeline.storage.causes import READ_ERRORS, cause
from pipeline.storage.remote import RemotePath, place_of
from pipeline.texts.redaction import bare, hidden, redacted
from pipeline.values.jsonvalues import KEYS

# outputs of earlier versions have no others
REPORTED = [name for name in CHOSEN_FROM if name not in (*LATER_NAMES, QUESTION_NAME, STATS, ANSWERS)]
KEY_COLUMNS = ("id", "question_index", "row", "error_type")
FEWEST_AT_ONCE = 1_000  # rows: a journal's chunks are small, and each table has its price

_JOURNAL = re.compile(r"\.(.+)\.journal")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One output to report on; `tables` reads it anew each time."""

    given: str
    label: str
    metadata: dict[str, Any]  # as `marsinfer batch` wrote it; of a journal, the settings that decide alone
    finished: bool = True
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    read: Callable[[Sequence[str], Collection[int] | None], Iterator[pa.Table]] = field(repr=False)

    def tables(self, columns: Sequence[str], only: Collection[int] | None = None) -> Iterator[pa.Table]:
        """All rows in tables of a bounded size, or those of the tables with the numbers `only`.

        Columns are the answer's own, and `REFERENCE`; those that the output lacks are null.
        """
        try:
            for table in self.read(columns, only):
                yield _reported(table, columns)
        except READ_ERRORS as error:
            raise ConfigError(f"{self.given} cannot be read: {cause(error)}") from error


def _held(schema: pa.Schema, columns: Sequence[str]) -> list[str]:
    """The columns of an output to read for these."""
    copied = holder(schema.names) if REFERENCE in columns else None
    held = stored_in(schema, columns)
    return held if copied is None else [*held, copied]


def _reported(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """These columns of a table that has what `_held` names, or that is of them itself."""
    own = own_columns(table, [name for name in columns if name != REFERENCE])
    if REFERENCE not in columns:
        return own
    return own.append_column(pa.field(REFERENCE, REFERENCES), references_in(table)).select(columns)


@contextmanager
def opened(given: Sequence[str]) -> Iterator[list[Run]]:
    """The runs of these outputs. Raises ConfigError for what is none, or cannot be read."""
    with ExitStack() as stack:
        stems = [Path(bare(name)).stem for name in given]
        names = map(hidden, given)
        labels = [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names, strict=True)]
        yield [_open(name, label, stack) for name, label in zip(given, labels, strict=True)]


def _open(given: str, label: str, stack: ExitStack) -> Run:
    place, given = place_of(given), hidden(given)
    try:
        if isinstance(place, RemotePath):
            # by way of a copy in scratch space, as a resumed run would read it
            mirror = Mirror(place, lambda: None)
            stack.callback(mirror.close)
            mirror.fetch()
            return _open_local(given, label, mirror.file, stack)
        try:
            return _open_local(given, label, place, stack)
        except FileNotFoundError:  # the run has published its output in this very moment
            return _open_local(given, label, place, stack)
    except READ_ERRORS as error:
        raise ConfigError(f"{given} cannot be read: {cause(error)}") from error


def _open_local(given: str, label: str, path: Path, stack: ExitStack) -> Run:
    journal = _JOURNAL.fullmatch(path.name)
    if journal and path.is_dir():
        path = path.with_name(journal[1])
    if path.is_dir():
        raise ConfigError(f"{given} is a folder; name an output of marsinfer batch")
    if path.suffix.lower() not in SINKS:
        raise ConfigError(f"{given} is no output of marsinfer batch: those are {', '.join(SINKS)}")
    folder = journal_folder(path)
    parts = [stack.enter_context(part.open("rb")) for part in journal_parts(folder)]
    sizes = [part.seek(0, 2) for part in parts]
    if not any(sizes):
        if path.exists():
            published, metadata = _publication(given, path)
            return Run(
                given=given,
                label=label,
                metadata=metadata,
                columns=tuple(published.schema.names),
                notes=tuple(_lacking(published.schema.names)),
                read=partial(_read_published, published),
            )
        if not folder.is_dir():
            raise ConfigError(f"{given} does not exist, nor does the journal of a run that writes it")
    return _unfinished(given, label, path, list(zip(parts, sizes, strict=True)))


def _publication(given: str, path: Path) -> tuple[Published, dict[str, Any]]:
    """A finished output, and what it says of its run."""
    lines_schema = None
    if needs_sidecar(path):
        metadata = _sidecar_metadata(path)
        lines_schema = _lines_schema(path, metadata)
    published = Published(path, lines_schema=lines_schema)
    if lines_schema is None:
        metadata = json.loads((published.schema.metadata or {}).get(METADATA_KEY, b"{}"))
    wanting = [name for name in ("id", "row", "status") if name not in published.schema.names]
    if wanting and (lines_schema is None or lines_schema.names):  # a file of no lines has no columns
        raise ConfigError(f"{given} is no output of marsinfer batch: it has no column {wanting[0]!r}")
    return published, redacted(metadata)  # which versions of before stored with all of a URL


def _lines_schema(path: Path, metadata: dict[str, Any]) -> pa.Schema:
    """Our columns of the first line, and a column for whatever keys follow, which are never looked at."""
    schema = pa.schema([], metadata={METADATA_KEY: json.dumps(metadata)})
    of_requests = is_of_requests(schema)
    files = [file for file in (path, errors_path(path)) if file.exists()] if of_requests else [path]
    first: Any = next((json.loads(line) for file in files for line in _first_line(file)), {})
    if not isinstance(first, dict):
        raise ValueError("its first line is no JSON object")
    names = names_told(first) if of_requests and first else list(first)
    layout = layout_in(schema)
    names = names if layout.is_usual else layout.names_of_rows(first)
    own = [pa.field(name, TYPES[name]) for name in own_prefix(names)]
    fields = [*own, pa.field(EXTRA, pa.large_string(), metadata=KEYS)] if first else []
    rows = pa.schema(fields, metadata=schema.metadata)
    return layout.file_schema(rows) if first else rows


def _first_line(path: Path) -> list[bytes]:
    with path.open("rb") as lines:
        return lines.readlines(1)


def _sidecar_metadata(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(sidecar_path(path).read_text(encoding="utf-8"))[METADATA_KEY.decode()] or {})
    except (OSError, ValueError, TypeError, LookupError):  # the rows can be told of without it
        return {}


def _lacking(columns: Sequence[str]) -> list[str]:
    """What to say of columns that are left out."""
    told = lacking_told(columns, REPORTED)
    return [] if told is None else [f"{told}, and nothing is told of it"]


def _read_published(
    published: Published, columns: Sequence[str], only: Collection[int] | None = None
) -> Iterator[pa.Table]:
    held = _held(published.schema, columns)
    for group in published:
        if only is None or group in only:
            yield published.read(group, held)


def _unfinished(given: str, label: str, path: Path, parts: list[tuple[BinaryIO, int]]) -> Run:
    folder = journal_folder(path)
    beginning = _beginning(folder)
    metadata: dict[str, Any] = {"settings_that_decide": beginning.settings}
    notes = [f"the run is not finished: these are the rows in {folder.name}"]
    base = None
    if path.exists() and beginning.extends:
        base, metadata = _publication(given, path)
        notes = [f"the run is not finished: these are the rows of {path.name} and of {folder.name}"]
    elif path.exists():
        notes.append(f"{path.name} itself is of an earlier run, which this one replaces when it is done")
    damages: list[Damage] = []
    for part, size in parts:
        deque(whole_chunks(part, size, damages.append), maxlen=0)
    if damages:
        notes.append(f"{damage_told(damages)}; these are all others")
    newest = (chunk.table for part, size in reversed(parts) for chunk in whole_chunks(part, size))
    names = next((table.schema.names for table in newest), None)
    notes += [] if names is None else _lacking(names)
    return Run(
        given=given,
        label=label,
        metadata=metadata,
        finished=False,
        columns=tuple(names or ()),
        notes=tuple(notes),
        read=partial(_read_unfinished, parts, base),
    )


def _beginning(folder: Path) -> Beginning:
    try:
        return Beginning.load(folder)
    except StorageError:
        if (folder / STATE_FILE).exists():
            raise
        return Beginning(settings={})  # the rows can be told of without it


def _read_unfinished(
    parts: list[tuple[BinaryIO, int]],
    base: Published | None,
    columns: Sequence[str],
    only: Collection[int] | None = None,
) -> Iterator[pa.Table]:
    """The newest part first, for a row that was run again counts once, as it was answered last."""
    for number, table in enumerate(_newest_first(parts, base, columns)):
        if only is None or number in only:
            yield table


def _newest_first(
    parts: list[tuple[BinaryIO, int]], base: Published | None, columns: Sequence[str]
) -> Iterator[pa.Table]:
    wanted = list(dict.fromkeys([*columns, *KEY_COLUMNS]))
    seen: set[bytes] = set()
    one_alone = len(parts) + (base is not None) == 1
    sources = [_chunks(part, size, wanted) for part, size in reversed(parts)]
    if base is not None:
        sources.append(_read_published(base, wanted))
    for source in sources:
        keys: set[bytes] = set()
        for table in source:
            if not one_alone:
                of_rows = list(_keys(table))
                table = table.filter(pa.array([key not in seen for key in of_rows], pa.bool_()))
                keys.update(of_rows)
            yield table
        seen |= keys


def _keys(table: pa.Table) -> Iterator[bytes]:
    columns = (table[name].to_pylist() for name in KEY_COLUMNS)
    for id, question, row, kind in zip(*columns, strict=True):
        yield row_key(id, question, row if kind == DUPLICATE else None)


def _chunks(part: BinaryIO, size: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a part, in tables of `FEWEST_AT_ONCE` rows or of as many chunks, and the rest."""
    tables: list[pa.Table] = []
    rows = 0
    for chunk in whole_chunks(part, size):
        held = chunk.table.select(_held(chunk.table.schema, columns))
        tables.append(_reported(held, columns))
        rows += chunk.table.num_rows
        if max(rows, len(tables)) >= FEWEST_AT_ONCE:
            yield pa.concat_tables(tables)
            tables, rows = [], 0
    if tables:
        yield pa.concat_tables(tables)
