"""Arguments of a user's own for the model's chat template, such as `enable_thinking`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.ext import Extension
from jinja2.parser import Parser

from pipeline.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# what a template is given beside the parameters of `apply_chat_template` and the names of special tokens
_GIVEN = ("messages", "conversations", "raise_exception", "strftime_now", "self", *DEFAULT_NAMESPACE)


class _Generation(Extension):
    """The tag with which templates mark what an assistant says, as transformers lets them."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_arguments(arguments: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, source: str) -> None:
    """Raise `ConfigError` for an argument that the chat template `source` does not use, or that is not free.

    Not free are names that stand for something else in chat templates, such as the messages.
    """
    if not arguments:
        return
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    special = (*tokenizer.special_tokens_map, *tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    taken = {*parameters, *special, *_GIVEN}
    used = sorted(_variables(source) - taken)
    for name in arguments:
        if name in taken:
            raise ConfigError(
                f"--template-arg {name}: what chat templates see as {name!r} comes from the prompt or the "
                "tokenizer, and cannot be given"
            )
        if name not in used:
            known = f"it takes {', '.join(used)}" if used else "it takes no arguments"
            hint = did_you_mean(name, used)
            raise ConfigError(
                f"--template-arg {name}: the model's chat template does not use it{hint}; {known}"
            )


def _variables(source: str) -> set[str]:
    """The names that a template reads and does not define itself."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        return meta.find_undeclared_variables(environment.parse(source))
    except TemplateError as error:
        raise ConfigError(f"--template-arg: the model's chat template cannot be read: {error}") from error
