"""What an output that is there means for a run, found out without changing anything."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.outputs.beginnings import check_columns, files_in, plain
from pipeline.outputs.chunks import Damage, pieces
from pipeline.outputs.dropped import DroppedRows
from pipeline.outputs.earlier import EarlierRows
from pipeline.outputs.mirror import Mirror
from pipeline.outputs.opening import begun, refuse_leftovers
from pipeline.outputs.parts import INDEX_FILE, damage_told, journal_folder, journal_parts
from pipeline.outputs.rowindex import DROPPED, INDEXED, PUBLISHED, RowIndex
from pipeline.outputs.writing import schema_as_written
from pipeline.records import Row
from pipeline.storage.remote import RemotePath, output_place


class DoneRows:
    """The rows that earlier runs have finished, by status at the start."""

    def __init__(self, index: RowIndex) -> None:
        self.index = index
        self.notes: list[str] = []  # what of a journal is lost
        self.earlier = EarlierRows(index)

    def is_done(self, source: Row, row_hash: str, *, is_fault: bool = False) -> bool:
        """As `Journal.is_done`."""
        return self.index.see(source, row_hash, is_fault=is_fault)

    @property
    def passed_over(self) -> int:
        """How many rows were asked for that are done."""
        return self.index.passed_over

    def counts(self) -> Counter[str]:
        """Of the rows that the output will have, those that are done, by status."""
        return self.index.counts(seen=True)


def refuse_unfinished(output: str) -> None:
    """A ConfigError where an unfinished run left answers that one without `--resume` would destroy."""
    place = output_place(output)
    if not isinstance(place, RemotePath):
        refuse_leftovers(place, overwrite=False)
        return
    with closing(Mirror(place, lambda: None)) as mirror:
        mirror.refuse_leftovers(overwrite=False)


@contextmanager
def no_rows() -> Iterator[DoneRows]:
    """What is done where a run begins afresh."""
    with tempfile.TemporaryDirectory(prefix="marsinfer-") as folder:
        index = RowIndex(Path(folder) / INDEX_FILE)
        with closing(index):
            yield DoneRows(index)


@contextmanager
def done_rows(
    output: str,
    schema: pa.Schema,
    settings: Mapping[str, Any],
    *,
    retry_errors: bool,
    timed: Sequence[str],
    heed: Callable[[pa.Table], None],
) -> Iterator[DoneRows]:
    """The rows that a resumed run need not answer. Raises ConfigError where it would be refused.

    `heed` is called with the rows, table by table, which have the columns `timed`.
    """
    found: dict[str, Any] = {}
    with no_rows() as done:
        for table, place in _tables(output, schema, plain(settings), timed, found):
            done.index.replay(table, *place, 0)
            heed(table)
        if retry_errors:
            done.index.forget_errors()
        damages = found.pop("damages", [])
        done.notes += [f"{damage_told(damages)} and would be answered again"] if damages else []
        done.earlier = EarlierRows(done.index, **found)
        yield done


def _tables(
    output: str, schema: pa.Schema, now: Any, timed: Sequence[str], found: dict[str, Any]
) -> Iterator[tuple[pa.Table, tuple[int, int]]]:
    """Tables of finished rows, with the part and chunk of each; `found` hears what else there is."""
    place = output_place(output)
    if not isinstance(place, RemotePath):
        yield from _local_tables(place, schema, now, timed, found)
        return
    with closing(Mirror(place, lambda: None)) as mirror:
        mirror.fetch()
        with mirror.named_as_given():
            yield from _local_tables(mirror.file, schema, now, timed, found)


def _local_tables(
    output: Path, schema: pa.Schema, now: Any, timed: Sequence[str], found: dict[str, Any]
) -> Iterator[tuple[pa.Table, tuple[int, int]]]:
    columns = tuple(dict.fromkeys((*INDEXED, *timed)))
    written = schema_as_written(output, schema)
    _, base = begun(output, written, now)
    dropped = DroppedRows(output, schema, now, resume=True)
    found["files"] = None if base is None else files_in(base.schema)
    found["can_drop"] = dropped.can_hold
    for group in dropped:
        yield dropped.read(group, columns), (DROPPED, group)
    for group in base or ():
        assert base is not None
        yield base.read(group, columns), (PUBLISHED, group)
    found["damages"] = []
    for number, path in enumerate(journal_parts(journal_folder(output)), start=PUBLISHED + 1):
        with path.open("rb") as part:
            for piece in pieces(part, path.stat().st_size):
                if isinstance(piece, Damage):
                    found["damages"].append(piece)
                    continue
                check_columns(output, piece.table.schema, schema.remove_metadata())
                yield piece.table.select(columns), (number, piece.offset)
