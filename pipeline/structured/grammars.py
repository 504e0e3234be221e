"""Forms of answers as grammars of llguidance, and what is wrong with them. Imports it only when it is needed.

Grammars are checked against a tokenizer of single bytes, so that no model is needed for it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from types import ModuleType
from typing import Any

from pipeline.errors import ConfigError
from pipeline.records import ResponseFormat
from pipeline.structured.misread import misread

NEEDS = "needs llguidance: pip install 'marsinfer[structured]'"
# between the tokens of JSON: with more a model may write white space until its tokens are used up
WHITE_SPACE = "[ ]?"
# of these characters alone: with \u0061 an answer could have a property of a schema under another spelling of
# its name, as one that the schema says nothing of
ESCAPES = 'nrbtf\\"'
NO_TEXT = "NoExtensionBias"  # what the library says where nothing can be written
MOST_CHECKED = 256  # forms that are known to be right
JSON_OBJECT = ResponseFormat("json_schema", '{"type":"object"}')


def json_schema_format(schema: dict[str, Any]) -> ResponseFormat:
    """The form of JSON under a schema, whose properties are written in their order there."""
    return ResponseFormat("json_schema", json.dumps(schema, separators=(",", ":")))


def choices_format(choices: tuple[str, ...]) -> ResponseFormat:
    """The form of an answer that is one of these texts."""
    return ResponseFormat("choices", json.dumps(choices))


def choices_of(form: ResponseFormat) -> list[str]:
    """The texts of which an answer is one; none where the form is another."""
    return list(json.loads(form.text)) if form.kind == "choices" else []


@lru_cache(MOST_CHECKED)
def check_format(form: ResponseFormat, place: str) -> None:
    """Raise ConfigError, in a line that begins with `place`, for a form that no answer can have.

    So it does for what llguidance does not know, and where that is not installed.
    """
    if form.kind == "choices":
        return
    library = llguidance(place)
    tokenizer = library.LLTokenizer("byte")
    try:
        grammar = grammar_of(form)
    except ValueError as error:  # of numbers and texts that Rust's JSON does not have
        raise ConfigError(f"{place} cannot be used: {cause(str(error))}") from error
    is_error, told = library.LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if is_error:
        raise ConfigError(f"{place} cannot be used: {cause(told[0])}")
    if form.kind == "json_schema" and (reason := next(misread(json.loads(form.text), library), None)):
        raise ConfigError(f"{place} cannot be used: {reason}")
    matcher = library.LLMatcher(tokenizer, grammar, log_level=0)
    matcher.compute_bitmask()
    if matcher.is_error():
        told = cause(matcher.get_error())
        reason = "it matches nothing" if form.kind == "regex" or told == NO_TEXT else told
        raise ConfigError(f"{place} cannot be used: {reason}")


def grammar_of(form: ResponseFormat, *, may_begin_with_space: bool = False) -> str:
    """A form that is no choice as a grammar of llguidance, in JSON.

    `may_begin_with_space` is for tokenizers that leave the first space of a text out when they decode it.
    """
    matcher = llguidance("a form").LLMatcher
    if form.kind == "regex":
        plain = f"/{matcher_regex(form.text)}/"
        if not may_begin_with_space:
            return str(matcher.grammar_from_regex(form.text))
        return str(
            matcher.grammar_from_lark(f'start: A | B\nA: " " {plain}\nB: {plain} & /([^ ](.|\\n)*)?/\n')
        )
    schema = json.loads(form.text)
    options = {"whitespace_pattern": WHITE_SPACE, "json_allowed_escapes": ESCAPES}
    if not may_begin_with_space:
        return str(matcher.grammar_from_json_schema(schema, overrides=options))
    inner = json.dumps(schema | {"x-guidance": options})
    return str(matcher.grammar_from_lark(f"start: /( )?/ json\njson: %json {inner}\n"))


def matcher_regex(text: str) -> str:
    """A regular expression as it stands between the slashes of a grammar."""
    return str(llguidance("a form").regex_to_lark(text, "")).replace("\n", "\\n")


def llguidance(place: str) -> ModuleType:
    """The library. Raises ConfigError, which begins with `place`, where it is not installed."""
    try:
        import llguidance as library
    except ImportError as error:
        raise ConfigError(f"{place} {NEEDS}") from error
    return library


def cause(error: str) -> str:
    """What the library says of an error, in a line: of a regular expression its last line says it."""
    lines = [line.strip() for line in error.split("<state>")[0].splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return said[0] if said else lines[0] if lines else "the library gives no reason"
