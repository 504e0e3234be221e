"""From the answers of a journal to the output, and to the file of the rows that leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from pipeline.outputs.answers import halves
from pipeline.outputs.beginnings import Beginning, copies_alike, files_in, with_files
from pipeline.outputs.dropped import DroppedRows
from pipeline.outputs.merge import Convert, ReadChunk, merge, null_misfits, refuse_misfit
from pipeline.outputs.parts import PARTIAL_DROPPED, PARTIAL_OUTPUT, PARTIAL_SIDECAR
from pipeline.outputs.published import Published
from pipeline.outputs.rowindex import INDEXED, PUBLISHED, Location, Order, RowIndex
from pipeline.outputs.sidecar import Written, needs_sidecar, write_sidecar
from pipeline.outputs.writing import AnswerWriter, refuse_existing
from pipeline.values.jsonvalues import same_values

Files = Sequence[tuple[str, int]]  # names, and how many rows of each went into the output
# by part, where in it, and the columns, None for all, which a part that is read whole need not heed
ReadColumns = Callable[[int, int, Sequence[str] | None], pa.Table]


@dataclass(frozen=True)
class Held:
    """What an output holds: how many rows, and whether they are in the order of the input."""

    rows: int = 0
    is_sorted: bool = True


def replay_output(base: Published, index: RowIndex) -> Held:
    """Enter the rows of an output."""
    rows, is_sorted, last = 0, True, (-1, -1)
    for group in base:
        table = base.read(group, INDEXED)
        index.replay(table, PUBLISHED, group, base.row_bytes(group))
        rows += table.num_rows
        indices = (-1 if index is None else index for index in table["question_index"].to_pylist())
        places = [last, *zip(table["row"].to_pylist(), indices, strict=True)]
        is_sorted &= all(first <= second for first, second in pairwise(places))
        last = places[-1]
    return Held(rows, is_sorted)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One writing of an output; what it raises leaves the journal, and the output that was there, intact."""

    output: Path
    folder: Path  # of the journal
    schema: pa.Schema
    written: pa.Schema  # the same as the output's format holds it
    beginning: Beginning
    base: Published | None  # the output that is extended
    index: RowIndex
    read: ReadColumns
    dropped: DroppedRows
    check: Callable[[], None]  # called often

    def is_current(self, order: Order, files: Files | None, held: Held) -> bool:
        """Whether the output holds the rows of the index, no others, in this order, and says its files."""
        if self.base is None or self.index.returned or self.index.unmoved != held.rows:
            return False
        says = files_in(self.base.schema)
        return (
            (held.is_sorted or order == "completion")
            and (files is None or says is None or says == list(files))
            and copies_alike(self.base.schema, self.written)
            and self._copies_are_current()
        )

    def _copies_are_current(self) -> bool:
        """Whether the rows, all of which the base has, have the copied columns there that they have now."""
        copied = halves(self.written)[1]
        if not copied.names:
            return True
        nothing = pa.schema([])
        then, now = (
            merge(
                self.index.locations("completion"), self._reader(copied.names), beside, current, refuse_misfit
            )
            for beside, current in ((copied, nothing), (nothing, copied))
        )
        return all(map(same_values, then, now))

    def write(self, order: Order, files: Files | None) -> None:
        """Rows that leave first, so that no moment is without them; `files` go into the metadata."""
        self._write_dropped()
        temporary, replaces = self.folder / PARTIAL_OUTPUT, self.beginning.replaces
        schema = self.schema if files is None else with_files(self.schema, files)
        with AnswerWriter(self.output, schema, replaces, temporary, self._write_sidecar) as writer:
            for table in self._merged(self.index.locations(order), writer.schema, refuse_misfit):
                writer.write_table(table)
            refuse_existing(self.output, replaces)
            # If the run is killed right after publishing, the next one may publish again.
            replace(self.beginning, replaces=True).save(self.folder)

    def _write_dropped(self) -> None:
        """Put rows that leave beside the output, and make ready what is there once others have come back."""

        def tables(*, after: bool) -> Callable[[pa.Schema], Iterator[pa.Table]]:
            return lambda schema: self._merged(self.index.dropped(after=after), schema, null_misfits)

        if self.index.leaving():
            self.dropped.write(tables(after=False), self.folder / PARTIAL_DROPPED)
        if self.index.returned:
            self.dropped.write_later(tables(after=True) if self.index.has_dropped(after=True) else None)

    def _merged(
        self, locations: Iterator[Location], schema: pa.Schema, convert: Convert
    ) -> Iterator[pa.Table]:
        for table in merge(locations, self._reader(None), *halves(schema), convert):
            self.check()
            yield table.replace_schema_metadata(schema.metadata)

    def _reader(self, columns: Sequence[str] | None) -> ReadChunk:
        """Reads chunks, of the output that is extended some columns or, with None, all."""

        def read(part: int, chunk: int) -> pa.Table:
            self.check()
            return self.read(part, chunk, columns)

        return read

    def _write_sidecar(self, size: int, schema: pa.Schema) -> None:
        if needs_sidecar(self.output):
            base = () if self.base is None else (Written(self.output.stat().st_size, self.base.schema),)
            write_sidecar(self.output, Written(size, schema), self.folder / PARTIAL_SIDECAR, base)
