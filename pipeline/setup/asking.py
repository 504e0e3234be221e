"""Which columns are read and what is asked, where the settings leave it to the input.

It is decided once, by the columns of the first file, and stored with the run: a resumed run goes on with what
was decided then, and an output that was begun by a version that decided nothing is extended without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.errors import ConfigError
from pipeline.inputs.requests import BODY, METHOD, REQUEST_ID
from pipeline.outputs.batch_lines import URL
from pipeline.settings.data_settings import ANSWER_TOKENS, ASKED, SUMMARY_TOKENS, DataSettings
from pipeline.settings.run_settings import BatchConfig

TEXT, QUESTION, ID, MESSAGES = "text", "question", "id", "messages"
TEXT_TOO = ("document", "content", "contents", "body")  # the text, where there is one of them and no `text`
QUESTION_TOO = ("query", "prompt", "instruction", "questions", "Question")  # not taken unasked

DECIDED = tuple(name for name in ASKED if name != "questions")  # which no input decides

Types = Mapping[str, str]  # of columns, by their names
Data = TypeVar("Data", bound=DataSettings)

NO_QUESTION = (
    "no question: give --question TEXT for all rows, --question-column NAME, --summarise, "
    "or a --prompt-template FILE that says what to do with each document"
)


class Settled(NamedTuple, Generic[Data]):
    """Settings that leave nothing open, and what a user should know of it."""

    settings: Data
    takes_ids: bool = False  # from the column `id`, which nobody named: an id that comes again gets a number
    asks_summary: bool = False  # because no question was found
    requests: bool = False  # rows are requests of OpenAI's Batch API
    notes: tuple[str, ...] = ()


def settled(data: Data, types: Types | None, *, template_asks: bool | None = None) -> Settled[Data]:
    """Columns and question of `data`, by the columns of the first file; `types` is None where none is known.

    `template_asks` says whether a prompt template has a place for a question, None that there is no template.
    Raises ConfigError for columns of which several could be meant.
    """
    notes: list[str] = []
    types = types or {}
    if template_asks is None and _are_requests(data, types):
        return Settled(data, requests=True, notes=("the rows are requests of OpenAI's Batch API",))
    if template_asks is None and _has_messages(data, types):
        data = replace(data, messages_column=MESSAGES)
        notes.append(f"the prompt is the chat in the column {MESSAGES!r}")
    if data.messages_column is not None:
        takes_ids = data.id_column is None and ID in types
        return Settled(replace(data, id_column=ID) if takes_ids else data, takes_ids, notes=tuple(notes))
    text = text_column(data.text_column, types, notes)
    values: dict[str, Any] = {"text_column": text}
    if not data.is_asked and template_asks is not False:
        values |= _asked(types, notes, in_template=template_asks is not None)
    takes_ids = data.id_column is None and ID in types and text != ID
    if takes_ids:
        values["id_column"] = ID
    asks_summary = "summarise" in values
    return Settled(replace(data, **values), takes_ids, asks_summary, notes=tuple(notes))


def _has_messages(data: DataSettings, types: Types) -> bool:
    """Whether rows have a column of messages, and nothing that could be a document."""
    return _is_open(data, types) and (is_list(types.get(MESSAGES, "")) or types.get(MESSAGES) == "null")


def _are_requests(data: DataSettings, types: Types) -> bool:
    """Whether rows have a body that is an object, and most of what stands beside it in a request."""
    others = {name: kind for name, kind in types.items() if name != BODY}
    is_object = types.get(BODY, "").startswith("struct") or types.get(BODY) == "null"
    beside = len({REQUEST_ID, METHOD, URL} & others.keys())
    return is_object and beside > 1 and data.id_column is None and _is_open(data, others)


def _is_open(data: DataSettings, types: Types) -> bool:
    """Whether no setting says what the document or the question is, and no column could be a document."""
    return data.text_column is None and not data.is_asked and not {TEXT, *TEXT_TOO} & set(types)


def as_begun(data: Data, columns: Mapping[str, Any], *, asks_summary: bool = False) -> Settled[Data]:
    """Columns and question of a run that goes on, as they were decided when it began.

    `asks_summary` says that it asked for summaries only as it found no question.
    """
    values = {name: columns[name] for name in ("text_column", "id_column") if getattr(data, name) is None}
    asks_summary = asks_summary and not data.is_asked
    if not data.is_asked:
        values |= {name: columns[name] for name in DECIDED}
        values["messages_column"] = columns.get("messages_column")
    data = replace(data, **values)
    takes_ids = bool(columns["takes_ids"]) and data.id_column == columns["id_column"]
    return Settled(data, takes_ids, asks_summary, requests=bool(columns.get("requests")))


def as_before(data: Data) -> Settled[Data]:
    """Columns and question of an output that was begun before any were decided by the input."""
    return Settled(replace(data, text_column=data.text_column or TEXT))


def with_lengths(config: BatchConfig) -> BatchConfig:
    """With the longest answer, and what becomes of over-long documents, where the settings do not say it."""
    is_summary = config.summarise is not None
    usual: dict[str, Any] = {
        "max_new_tokens": SUMMARY_TOKENS if is_summary else ANSWER_TOKENS,
        "on_overlong": "split" if is_summary and config.n == 1 else "error",
    }
    return replace(config, **{name: value for name, value in usual.items() if getattr(config, name) is None})


def columns_decided(settled: Settled[Any]) -> dict[str, Any]:
    """What `as_begun` reads, as plain values."""
    names = ("text_column", "id_column", *DECIDED)
    data = settled.settings
    chosen: dict[str, Any] = {"takes_ids": settled.takes_ids}
    if data.messages_column is not None:
        chosen["messages_column"] = data.messages_column
    if settled.requests:
        chosen["requests"] = True
    return {**{name: getattr(data, name) for name in names}, **chosen}


def text_column(given: str | None, types: Types | None, notes: list[str]) -> str:
    """The column of the text, by those of the first file where none is given."""
    if given is not None:
        return given
    types = types or {}
    found = [name for name in TEXT_TOO if is_text(types.get(name, ""))]
    if TEXT in types or not found:
        return TEXT
    if len(found) > 1:
        raise ConfigError(
            f"there is no column {TEXT!r}, and {' and '.join(map(repr, found))} could each be the document: "
            "--text-column NAME says which"
        )
    notes.append(f"the document is the column {found[0]!r} (--text-column names another)")
    return found[0]


def _asked(types: Types, notes: list[str], *, in_template: bool) -> dict[str, Any]:
    """What is asked, where the settings do not say it."""
    if QUESTION in types:
        if is_list(types[QUESTION]):
            raise ConfigError(f"{QUESTION!r} is a column of lists: --questions-column {QUESTION} asks each")
        return {"question_column": QUESTION}
    if alike := next((name for name in QUESTION_TOO if name in types), None):
        flag = "--questions-column" if is_list(types[alike]) else "--question-column"
        raise ConfigError(
            f"is {alike!r} the question? {flag} {alike} asks it, --summarise leaves it aside, and --question "
            "TEXT asks the same of all rows"
        )
    if in_template:
        return {}
    notes.append(
        "no question is given and there is no column 'question': a short summary is asked for "
        "(--summarise says so, --question TEXT asks something else)"
    )
    return {"summarise": "short"}


def is_text(kind: str) -> bool:
    """Whether an Arrow type's name is that of texts, or of categories that are texts."""
    return kind.removeprefix("dictionary<values=").startswith(("string", "large_string"))


def is_list(kind: str) -> bool:
    """Whether an Arrow type's name is that of lists."""
    return kind.startswith(("list", "large_list", "fixed_size_list"))
