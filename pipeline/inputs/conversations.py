"""From the chat messages of a row to what is its document, what is asked, and what stands around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.records import ErrorType, RowError, Turn
from pipeline.storage.causes import some
from pipeline.values.jsonvalues import parse_json

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
PARAGRAPH = "\n\n"
PART = "\n"  # between the parts of a message


class Conversation(NamedTuple):
    """Messages of which each text has a name: `document`, `question`, or `row.N` for field N."""

    text: str  # of the document
    question: str | None
    turns: tuple[Turn, ...]
    fields: dict[str, str]


def conversation(name: str, value: object) -> Conversation:
    """The messages in column `name`, a list of objects with `role` and `content`, or JSON of one.

    The document is the longest text of all, be it a message or a part of one. What is asked is the last
    message, which must be the user's, or of several parts the last that is not the document. Where that
    message is one text, and the document, its last paragraph is what is asked: the prompt is the same, and
    the question is what pruning keeps. Raises `RowError` of the kind `bad_messages` for what are no messages,
    `unsupported` for tools, images and other parts that are no text.
    """
    said = [_message(f"message {i} of {name!r}", each) for i, each in enumerate(_listed(name, value))]
    if said[-1][0] != "user":
        raise RowError("unsupported", f"the last message of {name!r} is the {said[-1][0]}'s, not the user's")
    between = [PART] * len(said)
    if len(said[-1][1]) == 1 and said[-1][1][0] == max((text for _, each in said for text in each), key=len):
        head, paragraph, tail = said[-1][1][0].rpartition(PARAGRAPH)
        if head.strip() and tail.strip():
            said[-1] = "user", [head, tail]
            between[-1] = paragraph
    places = [(turn, part) for turn, (_, texts) in enumerate(said) for part in range(len(texts))]
    document = max(places, key=lambda place: len(said[place[0]][1][place[1]]))
    asked = max((place for place in places if place[0] == len(said) - 1 and place != document), default=None)
    names = {place: f"row.{n}" for n, place in enumerate(places)}
    names[document] = "document"
    if asked is not None:
        names[asked] = "question"
    texts = {names[turn, part]: said[turn][1][part] for turn, part in places}
    return Conversation(
        text=texts["document"],
        question=texts.get("question"),
        turns=tuple(
            Turn(role, tuple(names[turn, part] for part in range(len(parts))), between[turn])
            for turn, (role, parts) in enumerate(said)
        ),
        fields={key.removeprefix("row."): text for key, text in texts.items() if key.startswith("row.")},
    )


def _listed(name: str, value: object) -> list[Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except (ValueError, RecursionError):
            raise RowError("bad_messages", f"{name!r} is text that is no JSON of messages") from None
    if not isinstance(value, list) or not value:
        raise RowError("bad_messages", f"{name!r} is no list of messages, or an empty one")
    return value


def _message(what: str, value: object) -> tuple[str, list[str]]:
    """Role and texts of a message."""
    if not isinstance(value, Mapping):
        raise RowError("bad_messages", f"{what} is no object with role and content")
    given = {key: each for key, each in value.items() if each not in (None, [], {}) and key != "name"}
    role = given.pop("role", None)
    if role not in ROLES:
        kind: ErrorType = "unsupported" if role in ("tool", "function") else "bad_messages"
        raise RowError(kind, f"{what} has the role {role!r}; known are {', '.join(ROLES)}")
    content = given.pop("content", None)
    if given:
        raise RowError("unsupported", f"{what} has {some(given)}, which is not supported")
    parts = content if isinstance(content, list) else [content]
    texts = [_text(what, part) for part in parts]
    if not any(text.strip() for text in texts):
        raise RowError("bad_messages", f"{what} is empty")
    return ROLES[role], [text for text in texts if text]


def _text(what: str, part: object) -> str:
    if isinstance(part, Mapping):
        if part.get("type") not in ("text", None):
            raise RowError("unsupported", f"{what} has a part of the type {part['type']!r}, and not text")
        part = part.get("text")
    if not isinstance(part, str):
        raise RowError("bad_messages", f"{what} has content that is no text")
    return part
