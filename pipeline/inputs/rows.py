"""From the values found in one row to a `Document`, or to the `RowFailure` that says what is wrong."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.inputs.columns import Columns
from pipeline.records import Document, Record, Row, RowFailure
from pipeline.storage.causes import ReadFault, some


@dataclass(frozen=True, slots=True)
class Fault:
    """Stands in a row where a value could not be had; `kind` is the failure's."""

    kind: str
    what: str


class Lacking(RowError):
    """A row has no such column at all."""

    def __init__(self, kind: str, column: str, flag: str, cells: Mapping[str, object]) -> None:
        super().__init__(kind, f"there is no {column!r}; it has: {some(list(cells)) or 'nothing'} ({flag})")
        self.column = column


BAD_UTF8 = Fault("bad_utf8", "is not valid UTF-8; convert the file to UTF-8")

UNASKED = "question"  # where a run asks for summaries only because the first row has none
UNASKED_REMEDY = f"--question-column {UNASKED} asks it, --summarise leaves it aside"
_MISSING = object()
# Letters and marks without a shape: a joiner, Hangul and Khmer fillers, Braille's blank, variation selectors.
_FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))
_JSON_TYPES = {bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}


def is_blank(text: str) -> bool:
    """Whether nothing of a text would be seen: it is white space, marks of format and fillers alone."""
    return not any(map(_is_seen, text))


def _is_seen(character: str) -> bool:
    if character.isspace() or character in _FILLERS:
        return False
    return unicodedata.category(character) not in ("Cc", "Cf")


def json_type(value: object) -> str:
    """What a value is in JSON's words."""
    told = (name for kind, name in _JSON_TYPES.items() if isinstance(value, kind))
    return next(told, "null" if value is None else "a string")


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a row stands: its number over the whole input, its place in messages, its id if not given."""

    row: int
    place: str
    default_id: str

    def failure(self, kind: str, message: str) -> RowFailure:
        """A failure of a row of which nothing is known but where it stands."""
        source = Row(row=self.row, id=self.default_id, place=self.place)
        return RowFailure(source=source, kind=kind, message=f"{self.place} {message}")

    def rest_lost(self, fault: ReadFault) -> RowFailure:
        """The one failure for this row and all after it in the file, however many they are."""
        return self.as_fault("unreadable", f"and all after it cannot be read: {fault}")

    def as_fault(self, kind: str, message: str) -> RowFailure:
        """The one failure for this row and others after it."""
        return replace(self.failure(kind, message), is_fault=True)


def build(
    columns: Columns, spot: Spot, cells: Mapping[str, object], passthrough: pa.RecordBatch | RowError | None
) -> Record:
    """The record of one row from its cells, which hold Python values or `Fault`s."""
    failed_copy = passthrough if isinstance(passthrough, RowError) else None
    row_id, failed_id = _id(columns, spot, cells)
    failed_id = None if columns.takes_ids else failed_id
    source = Row(
        row=spot.row,
        id=row_id,
        place=spot.place,
        task=None if columns.task is None else _task(cells.get(columns.task)),
        passthrough=None if isinstance(passthrough, RowError) else passthrough,
    )
    try:
        text = _text(columns.text, cells)
        question, questions = _question(columns, cells), _questions(columns, cells)
        for failed in (failed_id, failed_copy):
            if failed is not None:
                raise failed
    except RowError as error:
        lacks = error.column if isinstance(error, Lacking) else None
        return RowFailure(source=source, kind=error.kind, message=f"{spot.place}: {error}", lacks=lacks)
    return Document(source=replace(source, question=question), text=text, questions=questions)


def _text(name: str, cells: Mapping[str, object]) -> str:
    value = cells.get(name, _MISSING)
    if value is _MISSING:
        raise Lacking("missing_text", name, "--text-column names the text", cells)
    if value is None:
        raise RowError("missing_text", f"{name!r} is null")
    text = _string(repr(name), value, "bad_text_type")
    if is_blank(text):
        raise RowError("empty_document", f"{name!r} is empty")
    return text


def _question(columns: Columns, cells: Mapping[str, object]) -> str | None:
    name = columns.question
    if name is None and columns.asks_summary and cells.get(UNASKED) is not None:
        raise RowError(
            "unasked_question",
            f"there is a {UNASKED!r}, which the first row has not: {UNASKED_REMEDY}",
        )
    if name is None:
        return columns.fixed_question
    value = cells.get(name, _MISSING)
    if value is _MISSING:
        raise Lacking("missing_question", name, "--question-column names the question", cells)
    return _asked(repr(name), value)


def _asked(what: str, value: object) -> str:
    """A question, which `what` names in messages."""
    if value is None:
        raise RowError("missing_question", f"{what} is null")
    question = _string(what, value, "bad_question_type")
    if is_blank(question):
        raise RowError("missing_question", f"{what} is empty")
    return question


def _questions(columns: Columns, cells: Mapping[str, object]) -> tuple[str | RowError, ...] | None:
    """All questions of a row; in the place of one that cannot be asked, why."""
    name = columns.questions
    if name is None:
        return None
    value = cells.get(name, _MISSING)
    if value is _MISSING:
        raise Lacking("missing_question", name, "--questions-column names the questions", cells)
    if value is None:
        raise RowError("missing_question", f"{name!r} is null")
    if isinstance(value, Fault):
        raise RowError(value.kind, f"{name!r} {value.what}")
    if not isinstance(value, list):
        raise RowError(
            "bad_question_type",
            f"{name!r} is {json_type(value)}, not a list; --question-column takes one question a row",
        )
    if not value:
        raise RowError("missing_question", f"{name!r} is an empty list")
    return tuple(_asked_or_error(f"question {i} of {name!r}", each) for i, each in enumerate(value))


def _asked_or_error(what: str, value: object) -> str | RowError:
    try:
        return _asked(what, value)
    except RowError as error:
        return error


def _string(what: str, value: object, wrong_type: str) -> str:
    if isinstance(value, Fault):
        raise RowError(value.kind, f"{what} {value.what}")
    if not isinstance(value, str):
        raise RowError(wrong_type, f"{what} is {json_type(value)}, not a string")
    _refuse_surrogates(what, value)
    return value


def _id(columns: Columns, spot: Spot, cells: Mapping[str, object]) -> tuple[str, RowError | None]:
    """The row's id, or the default one with what is wrong with its own."""
    if columns.id is None:
        return spot.default_id, None
    try:
        return _own_id(columns.id, cells.get(columns.id)), None
    except RowError as error:
        return spot.default_id, error


def _task(value: object) -> str:
    """What cannot be read is no task that is known."""
    return "" if value is None or isinstance(value, Fault) else _as_text(value)


def _own_id(name: str, value: object) -> str:
    if isinstance(value, Fault):
        raise RowError(value.kind, f"{name!r} {value.what}")
    text = value if isinstance(value, str) else "" if value is None else _as_text(value)
    if is_blank(text):
        raise RowError("missing_id", f"there is no id in {name!r}; --id-column names the id")
    _refuse_surrogates(repr(name), text)
    return text


def _as_text(value: object) -> str:
    if isinstance(value, bool | float | list | dict):
        return json.dumps(value, default=str)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _refuse_surrogates(what: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "bad_utf8",
            f"{what} has half of a surrogate pair at character {error.start}, which no UTF-8 can hold",
        ) from None
