"""Reading Arrow IPC, as files (with a footer) and as streams (without)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.errors import InputError
from pipeline.inputs.finding import InputFile
from pipeline.inputs.long_integers import long_integers
from pipeline.inputs.passthrough import PassPlan
from pipeline.inputs.rows import rest_lost, until_fault
from pipeline.inputs.table_rows import TableReader, as_stream, is_sound
from pipeline.records import Record, RowError
from pipeline.storage.causes import READ_ERRORS, changed, told
from pipeline.storage.sniff import ARROW_FILE

FEATHER_V1_MAGIC = b"FEA1"
MOST_SCHEMA_BYTES = 1 << 20
MOST_ROWS_A_BYTE = 100  # documents that compress better have no text worth an answer


def open_arrow(file: InputFile) -> ArrowFileReader | ArrowStreamReader:
    """The reader that a file's content asks for, as names do not tell files from streams."""
    with told(f"{file.path} is not a readable Arrow file", kind=InputError, of=READ_ERRORS):
        with file.open() as handle:
            magic = handle.read(len(ARROW_FILE))
        if magic.startswith(FEATHER_V1_MAGIC):
            raise ValueError("it is Feather version 1; write it again as version 2 or as Parquet")
        try:
            return (ArrowFileReader if magic == ARROW_FILE else ArrowStreamReader)(file)
        except pa.ArrowNotImplementedError as error:
            _refuse_long_integers(file, error)
            raise


def _refuse_long_integers(file: InputFile, error: pa.ArrowNotImplementedError) -> None:
    """An `InputError` that names the column that keeps the file from being read, if that can be told."""
    with file.open() as handle:
        message = handle.read(MOST_SCHEMA_BYTES)
    try:
        found = long_integers(message[8 if message.startswith(ARROW_FILE) else 0 :])
    except (ValueError, LookupError, struct.error):
        return
    if found:
        raise InputError(
            f"{file.label}: column {found[0].column!r} is {found[0].type_name}, which cannot be read; "
            "write the file without it, or as Parquet"
        ) from error


class ArrowFileReader(TableReader):
    """One Arrow IPC file, memory-mapped where it is local."""

    def __init__(self, file: InputFile) -> None:
        with file.native(mapped=True) as source, pa.ipc.open_file(source) as reader:
            super().__init__(file, reader.schema)
        # Counts from the batches' headers, where the IPC reader would decompress every batch.
        self.num_rows = self._total = _count_rows(file)
        if not 0 <= self._total <= file.size * MOST_ROWS_A_BYTE:
            raise ValueError(f"its batches claim {self._total} rows")

    def _records(self) -> Iterator[Record]:
        return self._all_of(self._batches(), 0, self._total)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """All that there are; at their end, a ValueError for rows that did not come."""
        # Reading all columns copies nothing; a selection would be copied, the text with it, into one buffer.
        with self.file.native(mapped=True) as source, pa.ipc.open_file(source) as reader:
            if reader.schema != self.schema:
                raise changed()
            for i in range(reader.num_record_batches):
                yield _whole(reader.get_batch(i))
        raise ValueError("the file holds fewer rows than its batches say")


class ArrowStreamReader(TableReader):
    """One Arrow IPC stream; how many rows it has is known only at its end."""

    def __init__(self, file: InputFile) -> None:
        with file.native() as source, pa.ipc.open_stream(source) as reader:
            super().__init__(file, reader.schema)

    def _records(self) -> Iterator[Record]:
        """Those of all rows, then one failure if the stream is cut short."""
        for batch in until_fault(self._batches()):
            if isinstance(batch, RowError):
                yield rest_lost(self.place(self.rows_read), batch)
                self.rows_read += 1
                return
            yield from self._rows_of(_detached(batch, self._plan), self.rows_read)
            self.rows_read += batch.num_rows

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self.file.native() as source, pa.ipc.open_stream(source) as reader:
            if reader.schema != self.schema:
                raise changed()
            for batch in reader:
                self.fraction = source.tell() / max(self.file.size, 1)
                yield _whole(batch)


def _count_rows(file: InputFile) -> int:
    """From a file of ours: one that Arrow opens itself is closed by another thread, after it has answered."""
    with file.native(mapped=True) as source:
        return ds.IpcFileFormat().make_fragment(source).count_rows()


def _whole(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, if its buffers are as long as its header says, which reading does not check."""
    batch.validate()
    return batch


def _detached(batch: pa.RecordBatch, plan: PassPlan) -> pa.RecordBatch:
    """The batch with copies of what rows carry on: in a stream all columns share one buffer with the text."""
    names = [name for name in batch.schema.names if name in plan.sources]
    if not names or not is_sound(batch):
        return batch
    copies = pa.ipc.open_stream(as_stream(batch.select(names))).read_next_batch()
    columns = {name: batch.column(name) for name in batch.schema.names}
    return pa.RecordBatch.from_pydict(columns | {name: copies.column(name) for name in names})
