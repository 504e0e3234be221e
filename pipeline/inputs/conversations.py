"""From the chat messages or the prompt of a row to its document, what is asked, and what is around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.records import WHOLE, ErrorType, RowError, Turn
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
        said[-1] = "user", _paragraphs(said[-1][1][0])
        between[-1] = PARAGRAPH if len(said[-1][1]) > 1 else PART
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


def whole_prompt(name: str, value: object) -> Conversation:
    """The prompt in field `name`, a text or a list of one, which the model is to read as it is.

    Where it has several paragraphs, the longer of the last one and what is before it is the document, and the
    other is what is asked. Raises `RowError` of the kind `unsupported` for numbers of tokens and for several
    prompts, `bad_request` for what is no text, `empty_document` for an empty one.
    """
    prompts = value if isinstance(value, list) else [value]
    if prompts and all(isinstance(each, list | int) for each in prompts):
        raise RowError("unsupported", f"{name!r} is numbers of tokens; give the prompt as a text")
    given = [each for each in prompts if isinstance(each, str)]
    if len(given) < len(prompts):
        raise RowError("bad_request", f"{name!r} is no text, or list of one")
    if len(given) > 1:
        told = f"{name!r} has {len(given)} prompts, which is not supported; give each a request of its own"
        raise RowError("unsupported", told)
    if not any(each.strip() for each in given):
        raise RowError("empty_document", f"{name!r} is empty")
    texts = _paragraphs(given[0])
    names = ("document", "question") if len(texts[0]) >= len(texts[-1]) else ("question", "document")
    named = dict(zip(names, texts, strict=False))
    turn = Turn(WHOLE, tuple(named), PARAGRAPH)
    return Conversation(named["document"], named.get("question"), (turn,), {})


def _paragraphs(text: str) -> list[str]:
    """What stands before the last paragraph of a text, and that paragraph; or the text, if it is all."""
    head, _, tail = text.rpartition(PARAGRAPH)
    return [head, tail] if head.strip() and tail.strip() else [text]


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
