"""Reading text documents, one a file."""

from __future__ import annotations

from collections.abc import Generator

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.finding import InputFile
from pipeline.inputs.lines import LongLine
from pipeline.inputs.passthrough import PassPlan
from pipeline.inputs.rows import BAD_UTF8, Spot, build
from pipeline.records import Record
from pipeline.storage.causes import READ_ERRORS, ReadFault


class TextReader:
    """One text file, which has a text and no columns but those that its folders say."""

    num_rows: int | None = 1

    def __init__(self, file: InputFile, columns: Columns) -> None:
        self.file = file
        self.fraction = 0.0
        self._columns = columns
        if columns.questions is not None or not self._has(columns.question):
            raise InputError(
                f"{file.label} is a text document without columns; give one question for all documents"
            )
        for flag, name in (("--id-column", columns.id), ("--task-column", columns.task)):
            if not self._has(name):
                raise InputError(f"{file.label} is a text document without columns; leave out {flag}")

    def _has(self, name: str | None) -> bool:
        return name is None or name in self.file.partitions

    def read(self, plan: PassPlan, base: int) -> Generator[Record, None, int]:
        """The one record; returns 1."""
        label, longest = self.file.label, self._columns.longest_line
        spot = Spot(base, label, label)
        try:
            with self.file.open() as file:
                content = file.read(longest + 1)
            if len(content) > longest:
                yield spot.failure("long_line", str(LongLine(longest)))
                return 1
            text: object = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = BAD_UTF8
        except READ_ERRORS as error:
            yield spot.as_fault("unreadable", f"cannot be read: {ReadFault.of(error)}")
            return 1
        self.fraction = 1.0
        partitions = dict(self.file.partitions)
        copied = plan.of_object(partitions) if partitions else None
        yield build(self._columns, spot, {**partitions, self._columns.text: text}, copied)
        return 1
