"""Questions with names, of a file: each is asked about every document, and has a column of the output."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, did_you_mean
from pipeline.outputs.own_columns import OF_DOCUMENTS
from pipeline.values.json_answers import Schema, checked_schema, schema_in

FIELDS = ("name", "question", "schema", "max_new_tokens")
LISTED = "questions"  # the key under which a file that is no list has them

_LAYOUT = (
    f"a list, or a table {LISTED!r}, of objects with 'name' and 'question', and perhaps 'schema' and "
    "'max_new_tokens'"
)


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """One question to all documents."""

    name: str  # of its column
    question: str
    schema: Schema | None = None  # that its answers are to be valid under
    max_new_tokens: int | None = None  # None: as the run
    is_form: bool = False  # its answers can be no other than valid ones, by token masks


def read_questions(path: str, flag: str = "--questions") -> tuple[AskedQuestion, ...]:
    """The questions in a .json, .jsonl or .toml file, in its order.

    The path of a schema is one beside the file. Raises ConfigError for what cannot be asked, for names that
    are none of columns or come twice, and for schemas as `checked_schema` does.
    """
    place = f"{flag} {path}"
    entries = _entries(Path(path), place)
    if not entries:
        raise ConfigError(f"{place} has no questions: it must be {_LAYOUT}")
    asked = tuple(_question(entry, number, path, place) for number, entry in enumerate(entries, start=1))
    counts = Counter(each.name.casefold() for each in asked)
    twice = next((each.name for each in asked if counts[each.name.casefold()] > 1), None)
    if twice is not None:
        raise ConfigError(f"{place}: the name {twice!r} stands twice, perhaps in another case")
    return asked


def _entries(path: Path, place: str) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place} cannot be read: {error}") from error
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"{place} has an extension that is not known; it may be {', '.join(_PARSERS)}")
    try:
        content = parse(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is no {path.suffix.lower()}: {error}") from error
    entries = content.get(LISTED) if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ConfigError(f"{place} must be {_LAYOUT}")
    return entries


def _lines(text: str) -> list[Any]:
    entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return entries


_PARSERS: dict[str, Callable[[str], Any]] = {".json": json.loads, ".jsonl": _lines, ".toml": tomllib.loads}


def _question(entry: Any, number: int, path: str, place: str) -> AskedQuestion:
    at = f"{place}, question {number}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{at} is no object: the file must be {_LAYOUT}")
    for key in entry:
        if key not in FIELDS:
            known = ", ".join(FIELDS)
            raise ConfigError(f"{at} has an unknown {key!r}{did_you_mean(key, FIELDS)}; known are {known}")
    name, schema, most = _name(entry, at), entry.get("schema"), entry.get("max_new_tokens")
    if most is not None and (type(most) is not int or most < 1):
        raise ConfigError(f"{at} ({name}): 'max_new_tokens' is {most!r}, not a whole number of at least 1")
    if isinstance(schema, str):
        schema = schema_in(str(Path(path).parent / schema), f"{at} ({name}): schema")
    elif schema is not None:
        schema = checked_schema(schema, f"{at} ({name}): 'schema'")
    question = _text(entry, "question", f"{at} ({name})")
    return AskedQuestion(name=name, question=question, schema=schema, max_new_tokens=most)


def _name(entry: Mapping[str, Any], at: str) -> str:
    name = _text(entry, "name", at)
    if not name.isidentifier():
        raise ConfigError(
            f"{at}: the name {name!r} is none for a column; letters, digits and _ make one, a digit not first"
        )
    if name.casefold() in OF_DOCUMENTS:
        raise ConfigError(f"{at}: the name {name!r} is that of a column beside the questions; take another")
    return name


def _text(entry: Mapping[str, Any], key: str, at: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{at} has no {key!r}: it must be a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{at}: {key!r} has half of a surrogate pair, which no UTF-8 can hold") from None
    return value


def refuse_columns(asked: Sequence[AskedQuestion], columns: Sequence[str], flag: str = "--questions") -> None:
    """A ConfigError for a question that has the name of a column which is copied to the output."""
    taken = {column.casefold() for column in columns}
    for each in asked:
        if each.name.casefold() in taken:
            raise ConfigError(
                f"{flag}: the question {each.name!r} has the name of a column that is copied to the output; "
                "rename one of them, or leave the column out by --keep-columns"
            )
