"""What an output that is there means for a run, found out without changing anything."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.outputs.beginnings import Beginning, check_columns, files_in, plain, settings_in
from pipeline.outputs.chunks import Damage, scan_part
from pipeline.outputs.dropped import DroppedRows
from pipeline.outputs.finished import FinishedRows
from pipeline.outputs.formats import Published
from pipeline.outputs.mirror import Mirror, local_copy
from pipeline.outputs.own import written_schema
from pipeline.outputs.parts import (
    INDEX_FILE,
    begun,
    damage_told,
    has_answers,
    journal_folder,
    journal_parts,
    refuse_leftovers,
)
from pipeline.outputs.rowindex import DROPPED, INDEXED, PUBLISHED, RowIndex
from pipeline.outputs.sidecar import needs_sidecar, read_sidecar
from pipeline.outputs.writing import schema_as_written
from pipeline.storage.causes import READ_ERRORS, NetworkError, cause, storage_failure
from pipeline.storage.remote import RemotePath, output_place


def begun_with(output: str) -> Any:
    """The settings that decide, of the unfinished run or the output that is there, or else None.

    An output that does not say them counts as none: opening the journal tells it. Of a table in object
    storage that no unfinished run extends, only the schema is read; else all is fetched.
    """
    place = output_place(output)
    if isinstance(place, RemotePath) and not needs_sidecar(place):
        with closing(Mirror(place, lambda: None)) as mirror:
            if not mirror.has_journal():
                return _of_table(place)
    with local_copy(output) as path:
        folder = journal_folder(path)
        if has_answers(folder):
            return Beginning.load(folder).settings
        if not path.exists():
            return None
        try:
            schema = read_sidecar(path) if needs_sidecar(path) else Published(path).schema
            return settings_in(path, schema)
        except (*READ_ERRORS, ConfigError):
            return None


def _of_table(output: RemotePath) -> Any:
    try:
        if not output.exists():
            return None
        with output.open("rb") as file:
            return settings_in(Path(output.name), written_schema(pa.PythonFile(file, "r"), output.name))
    except NetworkError as error:
        raise storage_failure(f"{output} cannot be read: {cause(error)}", error) from error
    except (*READ_ERRORS, ConfigError):
        return None


def refuse_unfinished(output: str) -> None:
    """A ConfigError where an unfinished run left answers that one without `--resume` would destroy."""
    place = output_place(output)
    if not isinstance(place, RemotePath):
        refuse_leftovers(place, overwrite=False)
        return
    with closing(Mirror(place, lambda: None)) as mirror:
        mirror.refuse_leftovers(overwrite=False)


@contextmanager
def no_rows() -> Iterator[FinishedRows]:
    """What is done where a run begins afresh."""
    scratch = tempfile.TemporaryDirectory(prefix="marsinfer-")
    with scratch as folder, closing(RowIndex(Path(folder) / INDEX_FILE)) as index:
        yield FinishedRows(index)


@contextmanager
def done_rows(
    output: str,
    schema: pa.Schema,
    settings: Mapping[str, Any],
    *,
    retry_errors: bool,
    timed: Sequence[str],
    heed: Callable[[pa.Table], None],
) -> Iterator[FinishedRows]:
    """The rows that a resumed run need not answer. Raises ConfigError where it would be refused.

    `heed` is called with the rows, table by table, which have the columns `timed`.
    """
    columns = tuple(dict.fromkeys((*INDEXED, *timed)))
    with no_rows() as done:
        with local_copy(output) as path:
            for table, place in _tables(done, path, schema, plain(settings), columns):
                done.index.enter(table, *place, 0)
                heed(table)
        if retry_errors:
            done.index.forget_errors()
        done.count_at_start()
        yield done


def _tables(
    done: FinishedRows, output: Path, schema: pa.Schema, now: Any, columns: Sequence[str]
) -> Iterator[tuple[pa.Table, tuple[int, int]]]:
    """Tables of finished rows, with the part and chunk of each; `done` hears what else there is."""
    _, base = begun(output, schema_as_written(output, schema), now)
    dropped = DroppedRows(output, schema, now, resume=True)
    done.can_drop = dropped.can_hold
    for group in dropped:
        yield dropped.read(group, columns), (DROPPED, group)
    if base is not None:
        done.files = files_in(base.schema)
        for group in base:
            yield base.read(group, columns), (PUBLISHED, group)
    damages: list[Damage] = []
    for number, part in enumerate(journal_parts(journal_folder(output)), start=PUBLISHED + 1):
        for chunk in scan_part(part, damages.append):
            check_columns(output, chunk.table.schema, schema.remove_metadata())
            yield chunk.table.select(columns), (number, chunk.offset)
    if damages:
        done.notes.append(f"{damage_told(damages)} and would be answered again")
