"""What an output that is there means for a run, found out without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.outputs.beginnings import Beginning, files_in, plain, settings_in
from pipeline.outputs.dropped import DroppedRows
from pipeline.outputs.finished import FinishedRows
from pipeline.outputs.mirror import Mirror, local_copy
from pipeline.outputs.own import has_rows, table_schema
from pipeline.outputs.own_columns import INDEXED
from pipeline.outputs.parts import (
    Parts,
    begun,
    damage_told,
    finished_tables,
    has_answers,
    journal_folder,
    refuse_leftovers,
)
from pipeline.outputs.rowindex import scratch_index
from pipeline.outputs.sidecar import needs_sidecar, read_sidecar
from pipeline.outputs.writing import schema_as_written
from pipeline.storage.causes import READ_ERRORS, NetworkError, told
from pipeline.storage.remote import Place, RemotePath, output_place


def begun_with(output: str) -> Any:
    """The settings that decide, of the unfinished run or the output that is there, or else None.

    An output that does not say them counts as none: opening the journal tells it. So does one without rows,
    whose input may have shown no columns to decide by. Of a table in object storage that no unfinished run
    extends, only the schema is read, and whether there are rows; else all is fetched.
    """
    place = output_place(output)
    if isinstance(place, RemotePath) and not needs_sidecar(place):
        with closing(Mirror(place, lambda: None)) as mirror:
            if not mirror.has_journal():
                return _said_by(place)
    with local_copy(output) as path:
        folder = journal_folder(path)
        return Beginning.load(folder).settings if has_answers(folder) else _said_by(path)


def _said_by(output: Place) -> Any:
    with told(f"{output} cannot be read", of=NetworkError):
        try:
            if not (output.exists() and has_rows(output)):
                return None
            if isinstance(output, Path) and needs_sidecar(output):
                return settings_in(output, read_sidecar(output))
            return settings_in(output, table_schema(output))
        except NetworkError:
            raise
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
    with scratch_index() as index:
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
            now, parts = plain(settings), Parts(journal_folder(path))
            _, base = begun(path, schema_as_written(path, schema), now)
            dropped = DroppedRows(path, schema, now, resume=True)
            done.can_drop = dropped.can_hold
            done.files = None if base is None else files_in(base.schema)
            chunks = parts.scan(set_aside=False)
            for table, *place in finished_tables(path, schema, dropped.rows, base, chunks, columns):
                done.index.enter(table, *place)
                heed(table)
        damages = list(chain.from_iterable(parts.damages.values()))
        if damages:
            done.notes.append(f"{damage_told(damages)} and would be answered again")
        if retry_errors:
            done.index.forget_errors()
        done.count_at_start()
        yield done
