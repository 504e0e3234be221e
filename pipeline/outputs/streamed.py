"""Answers as JSON lines to standard output, as they end: nothing is kept that could be resumed."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from types import TracebackType
from typing import Self

import pyarrow as pa

from pipeline.errors import StorageError
from pipeline.outputs.answers import answers_table
from pipeline.outputs.finished import FinishedRows
from pipeline.outputs.formats import lines_sink, open_sink
from pipeline.outputs.layout import Together, layout_in
from pipeline.outputs.rowindex import Order, scratch_index
from pipeline.records import Answer
from pipeline.storage.causes import cause, told
from pipeline.values.converting import converted

STDOUT = 1


class StreamedRows(FinishedRows):
    """A context manager that stands in the place of a `Journal`; ids are known on disk, in scratch space."""

    resumed = False
    errors_file: str | None = None  # rows without an answer come with the others

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._failure: str | None = None  # of the first row that has no answer
        with ExitStack() as opened:
            index = opened.enter_context(scratch_index())
            # not sys.stdout, which may lead elsewhere so that only answers come here
            with told("standard output cannot be written"):
                if fcntl.fcntl(STDOUT, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:  # it is closed
                    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
                self._handle = os.fdopen(STDOUT, "wb", closefd=False)
            opened.callback(self._let_go)
            self._opened = opened.pop_all()
        self._sink = open_sink(lines_sink, self._handle, schema)
        self._together = Together(layout_in(schema).answers_a_row)
        super().__init__(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def append(self, answers: Sequence[Answer]) -> None:
        """Write the answers, which are with the reader on return; those of one row wait for each other.

        Raises BrokenPipeError where the reader has left, StorageError where they cannot be written.
        """
        if not answers:
            return
        table = answers_table(answers, self._schema)
        complete = list(chain.from_iterable(self._together.take(answers)))
        try:
            self._sink.write(self._as_lines(answers_table(complete, self._schema)))
            self._handle.flush()
        except BrokenPipeError:  # which is no failure of storage
            raise
        except OSError as error:
            raise StorageError(f"standard output cannot be written: {cause(error)}") from error
        self.index.enter(table, 1, 0, 0, seen=True)
        if self._failure is None:
            failed = (answer for answer in answers if answer.status != "ok")
            self._failure = next((f"{each.error_type}: {each.error_message}" for each in failed), None)

    def first_failure(self) -> str | None:
        """What ails the first row that has no answer."""
        return None if self._failure is None else " ".join(self._failure.split())

    def publish(
        self,
        order: Order = "input",
        check: Callable[[], None] = lambda: None,
        files: Sequence[tuple[str, int]] | None = None,
    ) -> bool:
        """All is written: there is nothing left to do."""
        return True

    def discard(self) -> None:
        """What is written stays."""

    def _as_lines(self, table: pa.Table) -> pa.Table:
        """With the types that JSON lines hold."""
        columns = [
            pa.chunked_array([converted(chunk, field.type) for chunk in column.chunks], field.type)
            if column.type != field.type
            else column
            for column, field in zip(table.columns, self._sink.schema, strict=True)
        ]
        return pa.Table.from_arrays(columns, schema=self._sink.schema)

    def _let_go(self) -> None:
        with suppress(OSError):  # a reader that has left
            self._handle.close()
