"""What reads one file, whatever its format: of text documents, and of files without rows, here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa

from pipeline.errors import InputError, MarsError, StorageError
from pipeline.inputs.columns import Columns, lacking_field
from pipeline.inputs.finding import InputFile
from pipeline.inputs.passthrough import PassPlan
from pipeline.inputs.rows import BAD_UTF8, build, failed, or_error, read_fault, rest_lost
from pipeline.records import Record, Row, RowError
from pipeline.storage.causes import READ_ERRORS, cause, is_out_of_reach


class Reader:
    """One opened file."""

    num_rows: int | None = None  # where that is known before its rows are read
    schema = pa.schema([])  # of a table, as far as it can be read
    unreadable: Mapping[str, str] = {}  # the types of columns that are not in it, as none can read them
    pages_without_text = 0  # of a document, once it is read

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.fraction = 0.0  # of the file that is read
        self.rows_read = 0  # so far, blank lines included, where `num_rows` does not tell

    def use(self, columns: Columns) -> None:
        """Settle what `read` reads; an `InputError` if the file cannot give it."""
        self._columns = columns

    def columns_told(self) -> dict[str, str] | None:
        """Names and Arrow types of the columns, as far as the file says them before it is read."""
        return {field.name: str(field.type) for field in self.schema} or None

    def read(self, plan: PassPlan, base: int) -> Iterator[Record]:
        """Records numbered from `base`; what is raised where the rest cannot be had now `is_out_of_reach`."""
        self.fraction, self.rows_read = 0.0, 0
        self._plan, self._base = plan, base
        return self._records()

    def _records(self) -> Iterator[Record]:
        raise NotImplementedError

    def place(self, index: int) -> Row:
        """Where row `index` of the file stands, with the id that it has if no column says another."""
        label = self.file.label
        return Row(row=self._base + index, id=f"{label}:{index}", place=f"{label} row {index}")


class EmptyReader(Reader):
    """A file without a byte, which has no rows, whatever its name says."""

    num_rows = 0

    def _records(self) -> Iterator[Record]:
        return iter(())


class LostReader(Reader):
    """A file that is out of reach, or that cannot be read from its beginning on, as a table that was cut.

    `error` says why, and `refusal` is what ends a run of such files alone.
    """

    def __init__(self, file: InputFile, error: BaseException, refusal: InputError | None = None) -> None:
        super().__init__(file)
        self.error = error
        self.is_out_of_reach = is_out_of_reach(error)
        unreachable = StorageError(f"{file.path} cannot be read: {cause(error)}")
        self.refusal: MarsError = unreachable if refusal is None or self.is_out_of_reach else refusal

    def _records(self) -> Iterator[Record]:
        """The one failure for all of its rows, however many they are."""
        yield rest_lost(self.place(0), read_fault(self.error))
        self.rows_read = 1


class TextReader(Reader):
    """One text file, which has a text and no columns but those that its folders say."""

    num_rows = 1

    def use(self, columns: Columns) -> None:
        super().use(columns)
        file = self.file
        if columns.messages is not None:
            raise InputError(f"{file.label} is a text document without columns; leave out --messages-column")
        if columns.questions is not None or not self._has(columns.question):
            raise InputError(
                f"{file.label} is a text document without columns; give one question for all documents"
            )
        for field in columns.fields:
            if not self._has(field):
                raise lacking_field(file.label, field, ["text", *file.partitions])
        for flag, name in (("--id-column", columns.id), ("--task-column", columns.task)):
            if not self._has(name):
                raise InputError(f"{file.label} is a text document without columns; leave out {flag}")

    def columns_told(self) -> dict[str, str] | None:
        return {"text": "string"}

    def _has(self, name: str | None) -> bool:
        return name is None or name in self.file.partitions

    def _records(self) -> Iterator[Record]:
        row = Row(row=self._base, id=self.file.label, place=self.file.label)
        yield self._record(row, self._columns.longest_line)

    def _record(self, row: Row, longest: int) -> Record:
        try:
            with self.file.open() as file:
                content = file.read(longest + 1)
            if len(content) > longest:
                return failed(row, "long_line", str(long_line(longest)))
            text: object = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = BAD_UTF8
        except READ_ERRORS as error:
            return failed(row, "unreadable", f"cannot be read: {read_fault(error)}", is_fault=True)
        self.fraction = 1.0
        partitions = dict(self.file.partitions)
        copied = or_error(self._plan.of_object, partitions) if partitions else None
        return build(self._columns, row, {**partitions, self._columns.text: text}, copied)


def long_line(longest: int) -> RowError:
    """Of a line, or a text, that was passed over, no more is known than that it has more bytes than these."""
    return RowError(
        "long_line",
        f"has more than {longest:,} bytes, and was passed over; --longest-line takes longer ones, "
        "for which there must be memory several times over",
    )
