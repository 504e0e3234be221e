"""The model's chat template: which one it is, how it wants its messages, and which day it prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from jinja2 import TemplateError

from pipeline.errors import ConfigError, ModelError
from pipeline.prompts.arguments import check_arguments
from pipeline.prompts.templates import EXPECTED, RENDER_ERRORS, ROW, SENTINELS, FileTemplate, told
from pipeline.prompts.trial import LONG_TEXT, check_ends
from pipeline.records import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REMEDY = "give --prompt-template FILE"
# those of strftime, which templates print the day with; with a hyphen they leave out a zero in front
_DIRECTIVES = "aAbBcdDeFGhHIjmMpRSTuUVwWxXyYzZ"
_OTHER_DAY = datetime(1999, 12, 31, 23, 58, 59)


def chat_source(tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the chat template that a prompt is made with; empty where there is none."""
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError:  # several by name, none of them the default
        return ""


def no_template(tokenizer: PreTrainedTokenizerFast) -> ModelError:
    """What to say of a tokenizer for which `chat_source` finds nothing."""
    named = tokenizer.chat_template
    if not isinstance(named, dict) or not named:
        return ModelError(f"the model has no chat template; {REMEDY}")
    names = ", ".join(sorted(named))
    several = f"the chat templates {names}" if len(named) > 1 else f"the chat template {names}"
    return ModelError(f"the model has {several}, and no default; {REMEDY}")


def failing(error: BaseException) -> ModelError:
    """What to say of a chat template that raises this."""
    return ModelError(f"the model's chat template fails: {told(error)}; {REMEDY}")


def check_chat(
    tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Raise TemplateError for a chat template that writes without end, before it is rendered here.

    `arguments` are those that it is rendered with.
    """
    given = f"{json.dumps(dict(arguments))}\0" if arguments else ""
    check_ends(f"chat\0{given}{tokenizer.chat_template}", lambda: _tried(tokenizer, arguments))


def _tried(tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any]) -> Iterator[str]:
    """What the chat template writes for every form of messages, short and long, that it does not refuse."""
    short, long = SENTINELS["document"], LONG_TEXT
    for texts in ({"user": short, "assistant": short}, {"system": short, "user": short}, {"user": long}):
        for in_parts in (False, True):
            with suppress(*EXPECTED):
                messages = chat_messages(texts, in_parts=in_parts)
                yield str(
                    tokenizer.apply_chat_template(
                        messages,
                        tokenize=False,
                        add_generation_prompt="assistant" not in texts,
                        **arguments,
                    )
                )


def chat_messages(texts: Mapping[str, str], *, in_parts: bool) -> list[dict[str, Any]]:
    """Messages by their roles, each a text or a list of parts, one text."""
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
        for role, text in texts.items()
    ]


@dataclass(frozen=True)
class ChatTemplate:
    """The model's chat template around one message of the user, and a system message where there is one.

    The user's message is the template `body`, or the document and then the question. `now` is the moment
    that the template sees as the present, `arguments` a user's own values for names that it uses. With
    `in_parts` a message is a list of parts, one text.
    """

    tokenizer: PreTrainedTokenizerFast
    source: str
    body: FileTemplate | None
    now: datetime
    arguments: Mapping[str, Any]
    in_parts: bool = False

    what = "model's chat template"
    remedy = REMEDY
    error = ModelError

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of a row that the user's message is made with."""
        return () if self.body is None else self.body.columns

    @property
    def conditions(self) -> frozenset[str]:
        """See `FileTemplate.conditions`."""
        return frozenset() if self.body is None else self.body.conditions

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        body: FileTemplate | None,
        now: datetime,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Raises `ModelError` where the tokenizer has none, or none that is the default.

        Raises `ConfigError` for arguments that it does not take.
        """
        source = chat_source(tokenizer)
        if not source:
            raise no_template(tokenizer)
        check_arguments(arguments, tokenizer, source)
        chat = cls(tokenizer, source, body, now, arguments)
        in_parts = replace(chat, in_parts=True)
        try:
            check_chat(tokenizer, arguments)
        except TemplateError as error:
            raise failing(error) from error
        return in_parts if not chat._writes_document() and in_parts._writes_document() else chat

    @cached_property
    def moment(self) -> str | None:
        """The present as the template prints it: a day, with the time where it prints that, or nothing."""
        if "strftime_now" not in self.source or self._rendered_at(_OTHER_DAY) == self._rendered_at(self.now):
            return None
        day = datetime.combine(self.now, time())
        return (
            self.now.date() if self._rendered_at(day) == self._rendered_at(self.now) else self.now
        ).isoformat()

    def render(self, fields: Mapping[str, str]) -> str:
        """The prompt with these texts, as transformers renders it; raises RENDER_ERRORS."""
        system = {"system": fields["system"]} if fields["system"] else {}
        return self._applied(chat_messages({**system, "user": self._message(fields)}, in_parts=self.in_parts))

    def _applied(self, messages: list[dict[str, Any]]) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._dated,
                tokenize=False,
                add_generation_prompt=True,
                **self.arguments,
            )
        )

    def render_first(self, fields: Mapping[str, str]) -> str:
        """The same; errors as `ConfigError` where the system message is at fault, or else `ModelError`."""
        refused = "this model's chat template takes no system message"
        try:
            text = self.render(fields)
        except RENDER_ERRORS as error:
            if fields["system"]:
                self.render_first({**fields, "system": ""})  # fails if the system message is not at fault
                raise ConfigError(f"{refused}: {told(error)}") from error
            raise failing(error) from error
        if fields["system"] == SENTINELS["system"] and SENTINELS["system"] not in text:
            raise ConfigError(f"{refused}: it leaves it out")
        return text

    def around(self, turns: tuple[Turn, ...]) -> ConversationTemplate:
        """The same around the messages of a row."""
        return ConversationTemplate(
            self.tokenizer, self.source, None, self.now, self.arguments, self.in_parts, turns
        )

    @cached_property
    def _dated(self) -> str:
        """The template with a clock that stands still, as transformers lends it no other function."""
        return _clock(self.now) + self.source if "strftime_now" in self.source else self.source

    def _message(self, fields: Mapping[str, str]) -> str:
        if self.body is not None:
            return self.body.render({**fields, "system": ""})
        return "\n\n".join(text for text in (fields["document"], fields["question"]) if text)

    def _writes_document(self) -> bool:
        try:
            text = self.render({**SENTINELS, "system": ""})
        except RENDER_ERRORS:
            return False
        return SENTINELS["document"] in text

    def _rendered_at(self, now: datetime) -> str:
        """What it writes for the texts of a prompt, or nothing where it fails, which is told elsewhere."""
        try:
            return replace(self, now=now).render({**SENTINELS, "system": ""})
        except RENDER_ERRORS:
            return ""


@dataclass(frozen=True)
class ConversationTemplate(ChatTemplate):
    """The model's chat template around messages, of which `turns` says the roles and the texts' names.

    A system message of the run's own comes in front of them; where they have one it is an error.
    """

    turns: tuple[Turn, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        names = (name for turn in self.turns for name in turn.texts)
        return tuple(name.removeprefix(ROW) for name in names if name.startswith(ROW))

    def render(self, fields: Mapping[str, str]) -> str:
        """The prompt with these texts by their names; raises RENDER_ERRORS."""
        if fields["system"] and self.turns[0].role == "system":
            raise ValueError("the row has a system message, and --system gives another")
        texts = {"system": fields["system"]} if fields["system"] else {}
        messages = chat_messages(texts, in_parts=self.in_parts)
        for turn in self.turns:
            text = turn.between.join(fields[name] for name in turn.texts)
            messages += chat_messages({turn.role: text}, in_parts=self.in_parts)
        return self._applied(messages)


def parse_moment(text: str) -> datetime:
    """What `ChatTemplate.moment` gave, as a moment of that day."""
    return datetime.fromisoformat(text) if "T" in text else datetime.combine(date.fromisoformat(text), time())


def _clock(now: datetime) -> str:
    """A macro of the name and result of the function `strftime_now`, at this moment."""
    steps = ["replace('%%', '\\0')"]
    for letter in _DIRECTIVES:
        value = now.strftime(f"%{letter}")
        steps += [f"replace('%{letter}', {value!r})", f"replace('%-{letter}', {_unpadded(value)!r})"]
    chain = " | ".join(["format", *steps, "replace('\\0', '%')"])
    # the last, empty output keeps a line break that the template may begin with
    return f"{{% macro strftime_now(format) %}}{{{{ {chain} }}}}{{% endmacro %}}{{{{ '' }}}}"


def _unpadded(value: str) -> str:
    return value.lstrip("0 ") or "0"
