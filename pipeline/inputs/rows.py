"""From the values found in one row to a `Document`, or to the `RowError` that says what is wrong."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa

from pipeline.inputs.columns import Columns
from pipeline.inputs.conversations import Conversation, conversation
from pipeline.inputs.requests import REQUEST_ID, request
from pipeline.records import AS_THE_RUN, Document, ErrorType, Record, Row, RowError
from pipeline.storage.causes import READ_ERRORS, cause, is_out_of_reach, some

T = TypeVar("T")

BAD_UTF8 = RowError("bad_utf8", "is not valid UTF-8; convert the file to UTF-8")
REWRITE = "write the file again from its source"

UNASKED = "question"  # where a run asks for summaries only because the first row has none
UNASKED_REMEDY = f"--question-column {UNASKED} asks it, --summarise leaves it aside"
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
    return next(told, "null" if value is None else _python_type(value))


def _python_type(value: object) -> str:
    return "a string" if isinstance(value, str) else f"of type {type(value).__name__}"


def read_fault(error: BaseException) -> RowError:
    """What is at the end of all that could be read; an error that no bytes are to blame for is raised."""
    if is_out_of_reach(error):
        raise error
    return RowError("unreadable", f"{cause(error)}; {REWRITE}")


def until_fault(items: Iterator[T]) -> Iterator[T | RowError]:
    """`items`, ended by what went wrong if producing the next one fails; errors of the consumer pass by."""

    def following() -> T | RowError | None:
        try:
            return next(items, None)
        except READ_ERRORS as error:
            return read_fault(error)

    return iter(following, None)


def failed(row: Row, kind: ErrorType, message: str, *, is_fault: bool = False) -> RowError:
    """The failure of a row of which nothing is known but where it stands, and of all after it, if a fault."""
    return RowError(kind, f"{row.place} {message}", row, is_fault=is_fault)


def rest_lost(row: Row, fault: RowError) -> RowError:
    """The one failure for this row and all after it in the file, however many they are."""
    return failed(row, fault.kind, f"and all after it cannot be read: {fault}", is_fault=True)


def or_error(make: Callable[..., T], *arguments: object) -> T | RowError:
    """What is made of these, or what ails them."""
    try:
        return make(*arguments)
    except RowError as error:
        return error


def build(
    columns: Columns, row: Row, cells: Mapping[str, object], passthrough: pa.RecordBatch | RowError | None
) -> Record:
    """The record of one row from its cells: Python values, or for one that could not be had, why.

    `row` says where it stands, and the id that it has unless a column says another.
    """
    own_id = None if columns.id is None else or_error(_own_id, columns.id, cells.get(columns.id))
    source = replace(
        row,
        id=own_id if isinstance(own_id, str) else row.id,
        task=None if columns.task is None else _task(cells.get(columns.task)),
        passthrough=None if isinstance(passthrough, RowError) else passthrough,
    )
    try:
        if columns.requests or columns.messages is not None:
            if columns.requests:
                said, params, model = request(cells)
            else:
                said, params, model = _conversation(columns.messages or "", cells), AS_THE_RUN, None
            _check_texts(said)
            _refuse_faults(None if columns.takes_ids else own_id, passthrough)
            source = replace(
                source,
                question=said.question,
                turns=said.turns,
                fields=said.fields,
                params=params,
                model=model,
            )
            return Document(source=source, text=said.text)
        text = _text(columns.text, cells)
        question, questions = _question(columns, cells), _questions(columns, cells)
        fields = {name: _field(name, cells) for name in columns.fields}
        _refuse_faults(None if columns.takes_ids else own_id, passthrough)
    except RowError as error:
        return error.at(source)
    return Document(source=replace(source, question=question, fields=fields), text=text, questions=questions)


def _refuse_faults(*found: object) -> None:
    """Raise the first of these that is a failure."""
    for each in found:
        if isinstance(each, RowError):
            raise each


def _conversation(name: str, cells: Mapping[str, object]) -> Conversation:
    return conversation(name, _cell(name, cells, "missing_messages", "--messages-column names the messages"))


def _check_texts(said: Conversation) -> None:
    for text in (said.text, said.question or "", *said.fields.values()):
        _refuse_surrogates("a message", text)
    if is_blank(said.text):
        raise RowError("empty_document", "the longest message is empty")


def _cell(name: str, cells: Mapping[str, object], kind: ErrorType, flag: str) -> object:
    """The value of a column that each row must have; `kind` is that of the failure of one that has not."""
    if name not in cells:
        message = f"there is no {name!r}; it has: {some(cells) or 'nothing'} ({flag})"
        raise RowError(kind, message, lacks=name)
    if cells[name] is None:
        raise RowError(kind, f"{name!r} is null")
    return _sound(repr(name), cells[name])


def _sound(what: str, value: object) -> object:
    """The value, if it could be read."""
    if isinstance(value, RowError):
        raise RowError(value.kind, f"{what} {value}")
    return value


def _text(name: str, cells: Mapping[str, object]) -> str:
    value = _cell(name, cells, "missing_text", "--text-column names the text")
    text = _string(repr(name), value, "bad_text_type")
    if is_blank(text):
        raise RowError("empty_document", f"{name!r} is empty")
    return text


def _field(name: str, cells: Mapping[str, object]) -> str:
    """A value as the prompt template writes it: nothing for a null, JSON for lists and objects."""
    if name in cells and cells[name] is None:
        return ""
    value = _cell(name, cells, "missing_field", "--prompt-template writes it")
    text = value if isinstance(value, str) else _as_text(value)
    _refuse_surrogates(repr(name), text)
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
    value = _cell(name, cells, "missing_question", "--question-column names the question")
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
    value = _cell(name, cells, "missing_question", "--questions-column names the questions")
    if not isinstance(value, list):
        raise RowError(
            "bad_question_type",
            f"{name!r} is {json_type(value)}, not a list; --question-column takes one question a row",
        )
    if not value:
        raise RowError("missing_question", f"{name!r} is an empty list")
    return tuple(or_error(_asked, f"question {i} of {name!r}", each) for i, each in enumerate(value))


def _string(what: str, value: object, wrong_type: ErrorType) -> str:
    if not isinstance(value, str):
        raise RowError(wrong_type, f"{what} is {json_type(value)}, not a string")
    _refuse_surrogates(what, value)
    return value


def _task(value: object) -> str:
    """What cannot be read is no task that is known."""
    return "" if value is None or isinstance(value, RowError) else _as_text(value)


def _own_id(name: str, value: object) -> str:
    value = _sound(repr(name), value)
    text = value if isinstance(value, str) else "" if value is None else _as_text(value)
    if is_blank(text):
        hint = "" if name == REQUEST_ID else "; --id-column names the id"
        raise RowError("missing_id", f"there is no id in {name!r}{hint}")
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
