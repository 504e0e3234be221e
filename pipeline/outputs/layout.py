"""How an output's rows stand in its file, where that is not a row an answer with the columns of `Answer`.

Where questions have names, a row of the file is a document: `id`, `row`, `status`, a struct of the other
columns for each question, and the copied columns. Where a JSON schema says types, a column `value`, or a
field of the struct, holds what the answer says. Journals and readers know rows an answer alone: an output is
laid out when it is written, and its rows are restored when it is read. `value` is made anew each time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.outputs.answers import ANSWER_FIELDS, as_utf8, halves, plain
from pipeline.outputs.beginnings import about
from pipeline.outputs.merge import rows_at
from pipeline.outputs.own_columns import OF_DOCUMENTS, OWN_NAMES, VALUE
from pipeline.records import Answer
from pipeline.values.json_answers import Schema, answered_json
from pipeline.values.typed import JsonType, json_type_of

LAYOUT_KEY = "layout"  # of an output's metadata
OF_ROWS = ("id", "row", "question_index")  # which no struct of a question has
QUESTION_INDEX = next(each for each in ANSWER_FIELDS if each.name == "question_index")
NO_QUESTION = ""  # in place of a question's name, where a row is an answer


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """A row of the file is an answer, with its typed value if `schemas` has a schema for `NO_QUESTION`."""

    schemas: Mapping[str, Schema] = field(default_factory=dict)  # of typed values, by question

    @property
    def questions(self) -> tuple[str, ...]:
        """The names of those that have columns."""
        return ()

    @property
    def is_usual(self) -> bool:
        """Whether the file has the columns of its rows, and no others."""
        return not (self.questions or self.schemas)

    @property
    def answers_a_row(self) -> int:
        return max(len(self.questions), 1)

    @cached_property
    def types(self) -> dict[str, JsonType]:
        return {name: json_type_of(schema) for name, schema in self.schemas.items()}

    def as_dict(self) -> dict[str, Any]:
        """As plain values, of which `layout_of` makes it again."""
        return {"questions": list(self.questions), "schemas": dict(self.schemas)}

    # schemas

    def file_schema(self, rows: pa.Schema) -> pa.Schema:
        """The columns of the file that holds rows of these columns."""
        own, copied = halves(rows)
        return pa.schema([*own, *self._value_field(NO_QUESTION), *copied], metadata=rows.metadata)

    def rows_schema(self, file: pa.Schema) -> pa.Schema:
        """The columns of the rows that a file of these columns holds; a LookupError where it holds none."""
        own, copied = halves(file)
        values = len(self.types)
        if copied.names[:values] != [VALUE] * values:
            raise LookupError(VALUE)
        return pa.schema([*own, *list(copied)[values:]], metadata=file.metadata)

    def stored_in(self, file: pa.Schema, columns: Collection[str]) -> list[str]:
        """The columns of a file that hold these of its rows."""
        return [name for name in file.names if name in columns]

    def names_of_rows(self, line: Mapping[str, Any]) -> list[str]:
        """The columns of the rows that a file holds, by a row of it with these columns."""
        return list(line)

    # tables

    def laid_out(self, rows: pa.Table, file: pa.Schema) -> pa.Table:
        """Rows, those of a document one behind the other, as a file of this schema holds them."""
        own, copied = halves(rows.schema)
        values = [self._values(rows, NO_QUESTION)] if self.types else []
        columns = [*rows.select(own.names).columns, *values, *rows.select(copied.names).columns]
        return pa.Table.from_arrays(columns, schema=file)

    def whole(self, rows: pa.Table) -> int:
        """How many of these rows, from the first on, stand in rows of the file to which no more will come."""
        return rows.num_rows

    def restored(self, table: pa.Table) -> pa.Table:
        """The rows of a table as a file holds it, which need not have all of the copied columns."""
        values = [VALUE] if self.types else []
        return table.select([name for name in table.column_names if name not in values])

    def _value_field(self, question: str) -> list[pa.Field]:
        return [pa.field(VALUE, self.types[question].arrow)] if question in self.types else []

    def _values(self, answers: pa.Table, question: str) -> pa.Array:
        """What answers to a question say, as values of its type."""
        kind = self.types[question]
        values = [value_of(text, kind) for text in answers["answer"].to_pylist()]
        try:
            return pa.array(values, kind.arrow)
        except UnicodeEncodeError:
            return pa.array([as_utf8(value) for value in values], kind.arrow)

    # rows in memory

    def row_of(self, answers: Sequence[Answer], names: Collection[str]) -> dict[str, Any]:
        """The row that these answers make, which have the columns `names`, as Python's values."""
        (answer,) = answers
        return self._told(NO_QUESTION, answer, names)

    def _told(self, question: str, answer: Answer, names: Collection[str]) -> dict[str, Any]:
        kind = self.types.get(question)
        value = {} if kind is None else {VALUE: value_of(answer.answer, kind)}
        return {**plain(answer, names), **value}


@dataclass(frozen=True, kw_only=True)
class DocumentLayout(RowLayout):
    """A row of the file is a document, with a struct for each question."""

    names: tuple[str, ...]

    @property
    def questions(self) -> tuple[str, ...]:
        return self.names

    @property
    def _front(self) -> list[str]:
        """The columns before the copied ones."""
        return [*OF_DOCUMENTS, *self.questions]

    def file_schema(self, rows: pa.Schema) -> pa.Schema:
        own, copied = halves(rows)
        inner = [each for each in own if each.name not in OF_ROWS]
        fields = [own.field(name) for name in OF_DOCUMENTS]
        fields += [pa.field(name, pa.struct([*inner, *self._value_field(name)])) for name in self.questions]
        return pa.schema([*fields, *copied], metadata=rows.metadata)

    def rows_schema(self, file: pa.Schema) -> pa.Schema:
        front = self._front
        if file.names[: len(front)] != front:
            raise LookupError("the columns of questions")
        known = {each.name: each for each in (QUESTION_INDEX, *file.field(self.questions[0]).type)}
        known |= {name: file.field(name) for name in ("id", "row")}
        own = [known[name] for name in OWN_NAMES if name in known]
        return pa.schema([*own, *list(file)[len(front) :]], metadata=file.metadata)

    def stored_in(self, file: pa.Schema, columns: Collection[str]) -> list[str]:
        copied = file.names[len(self._front) :]
        return [*self._front, *(name for name in copied if name in columns)]

    def names_of_rows(self, line: Mapping[str, Any]) -> list[str]:
        answers = (line.get(name) for name in self.questions)
        told = {*OF_ROWS, *next((answer for answer in answers if answer is not None), ())}
        return [name for name in OWN_NAMES if name in told]

    def laid_out(self, rows: pa.Table, file: pa.Schema) -> pa.Table:
        documents = _documents(rows)
        firsts = rows_at(rows, [min(document.values()) for document in documents])
        ids, statuses = map(_document_id, firsts["id"].to_pylist()), rows["status"].to_pylist()
        joined = [_joined(statuses[place] for place in document.values()) for document in documents]
        columns = [pa.array(ids, file.field("id").type), firsts["row"], pa.array(joined, pa.string())]
        columns += [
            self._struct(rows, name, [document.get(name) for document in documents], file.field(name).type)
            for name in self.questions
        ]
        columns += [firsts[name] for name in halves(rows.schema)[1].names]
        return pa.Table.from_arrays(columns, schema=file)

    def whole(self, rows: pa.Table) -> int:
        numbers = rows["row"].to_pylist()
        last = numbers.index(numbers[-1]) if numbers else 0
        answered = [len(document) for document in _documents(rows.slice(last))]
        return rows.num_rows if min(answered, default=0) == len(self.questions) else last

    def _struct(
        self, rows: pa.Table, question: str, places: Sequence[int | None], kind: pa.DataType
    ) -> pa.Array:
        """The answers to one question at these places; null where there is none."""
        own = [each.name for each in kind if each.name != VALUE]
        answers = rows.select(own).take(pa.array(places, pa.int64())).combine_chunks()
        columns = [pa.concat_arrays(column.chunks) for column in answers.columns]
        if question in self.types:
            columns.append(self._values(answers, question))
        mask = pa.array([place is None for place in places])
        return pa.StructArray.from_arrays(columns, fields=list(kind), mask=mask)

    def restored(self, table: pa.Table) -> pa.Table:
        schema = self.rows_schema(table.schema)
        own, copied = halves(schema)
        answers, places = [], []  # of each answer the document, the question, and where it is
        begins = 0
        for index, name in enumerate(self.questions):
            documents, found = _answers_to(table, name, index, own)
            answers.append(found)
            places += [(document, index, begins + place) for place, document in enumerate(documents)]
            begins += found.num_rows
        places.sort()
        sorted_answers = rows_at(pa.concat_tables(answers), [place for _, _, place in places])
        beside = rows_at(table.select(copied.names), [document for document, _, _ in places])
        return pa.Table.from_arrays([*sorted_answers.columns, *beside.columns], schema=schema)

    def row_of(self, answers: Sequence[Answer], names: Collection[str]) -> dict[str, Any]:
        first, inner = answers[0], [name for name in names if name not in OF_ROWS]
        status = _joined(answer.status for answer in answers)
        told = zip(self.questions, answers, strict=True)
        return {
            **{"id": _document_id(first.id), "row": first.row, "status": status},
            **{name: self._told(name, answer, inner) for name, answer in told},
        }


def layout_of(questions: Iterable[str] = (), schemas: Mapping[str, Schema] | None = None) -> RowLayout:
    """That of an output with columns for these questions, if there are any, and such typed values."""
    names, schemas = tuple(questions), schemas or {}
    return DocumentLayout(names=names, schemas=schemas) if names else RowLayout(schemas=schemas)


def layout_in(schema: pa.Schema) -> RowLayout:
    """How rows stand in a file of this schema, by its metadata."""
    try:
        return layout_of(**about(schema).get(LAYOUT_KEY, {}))
    except TypeError:  # it is another's
        return RowLayout()


def rows_schema(file: pa.Schema) -> pa.Schema:
    """The columns of the rows of a file, however they stand in it."""
    try:
        return layout_in(file).rows_schema(file)
    except LookupError:
        return file


def value_of(answer: str | None, kind: JsonType) -> Any:
    """What an answer says in JSON, as far as it has the type; None where it is no JSON."""
    if answer is None:
        return None
    try:
        return kind.fit(answered_json(answer))
    except (ValueError, RecursionError):
        return None


def _document_id(id: str) -> str:
    """The id of a document by that of one of its answers, which ends with the question's name."""
    return id.rpartition("#")[0]


def _documents(rows: pa.Table) -> list[dict[str, int]]:
    """Of each document, by question, the places of its rows, which stand one behind the other.

    Several documents may have one row number: what stands for a row that could not be read beside one of
    before. Their rows may alternate.
    """
    documents: list[dict[str, int]] = []
    of_number: dict[str, dict[str, int]] = {}  # documents with the number of the row at hand, by id
    number = None
    for place, (id, row) in enumerate(zip(rows["id"].to_pylist(), rows["row"].to_pylist(), strict=True)):
        document_id, _, name = id.rpartition("#")
        if row != number:
            of_number, number = {}, row
        if document_id not in of_number or name in of_number[document_id]:
            of_number[document_id] = {}
            documents.append(of_number[document_id])
        of_number[document_id][name] = place
    return documents


def _answers_to(table: pa.Table, name: str, index: int, own: pa.Schema) -> tuple[list[int], pa.Table]:
    """Which documents have an answer to the question with this name and index, and these as rows."""
    there = pc.is_valid(table[name])
    found = table.filter(there)
    documents = [place for place, is_there in enumerate(there.to_pylist()) if is_there]
    told = {
        "id": pa.array([f"{id}#{name}" for id in found["id"].to_pylist()], own.field("id").type),
        "row": found["row"],
        "question_index": pa.repeat(pa.scalar(index, QUESTION_INDEX.type), found.num_rows),
    }
    columns = [
        told[each.name] if each.name in told else pc.struct_field(found[name], each.name) for each in own
    ]
    return documents, pa.Table.from_arrays(columns, schema=own.remove_metadata())


def _joined(statuses: Iterable[str]) -> str:
    """That of a document: ok if all its answers are."""
    found = set(statuses)
    return "ok" if found <= {"ok"} else "error" if "error" in found else "skipped"


class Together:
    """Puts the answers together that make one row of the output, whenever they come."""

    def __init__(self, count: int) -> None:
        """`count` is how many a row has."""
        self._count = count
        self._waiting: defaultdict[int, list[Answer]] = defaultdict(list)  # by row number

    def take(self, answers: Iterable[Answer]) -> list[list[Answer]]:
        """The answers of each row that is complete with these, in the order of their questions."""
        complete = []
        for answer in answers:
            of_row = self._waiting[answer.row]
            of_row.append(answer)
            if len(of_row) == self._count:
                del self._waiting[answer.row]
                complete.append(sorted(of_row, key=lambda each: each.question_index or 0))
        return complete
