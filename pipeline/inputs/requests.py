"""Requests of OpenAI's Batch API: the chat or the prompt in one, and what it says itself of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pipeline.errors import ConfigError
from pipeline.inputs.conversations import Conversation, conversation, whole_prompt
from pipeline.outputs.batch_lines import CHAT, COMPLETIONS, URL
from pipeline.records import ErrorType, ResponseFormat, RowError, SamplingParams
from pipeline.storage.causes import some
from pipeline.structured.grammars import JSON_OBJECT, check_format, json_schema_format

REQUEST_ID, METHOD, BODY = "custom_id", "method", "body"
REQUEST_KEYS = (REQUEST_ID, METHOD, URL, BODY)

MOST_STOPS = 4
MOST_TEMPERATURE = 2
MOST_PENALTY = 100
LONGEST_TOLD = 60  # characters of a value

# fields of a body that change nothing of its answer
IGNORED = frozenset(
    {
        *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store", "stream_options", "user"),
    }
)
# fields that are known and do nothing with these values; with others they are not supported
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "stream": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
WITHOUT_EFFECT_OF_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **{
        name: WITHOUT_EFFECT[name]
        for name in ("frequency_penalty", "logit_bias", "n", "presence_penalty", "stream")
    },
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
}


class Endpoint(NamedTuple):
    """What requests to one address have in their bodies."""

    asks: str  # the field with what is asked
    missing: ErrorType  # what a request without that field is
    read: Callable[[str, object], Conversation]
    limits: tuple[str, ...]  # names of the limit on the answer's tokens
    without_effect: Mapping[str, tuple[Any, ...]]


ENDPOINTS = {
    CHAT: Endpoint(
        "messages",
        "missing_messages",
        conversation,
        ("max_completion_tokens", "max_tokens"),
        WITHOUT_EFFECT,
    ),
    COMPLETIONS: Endpoint(
        "prompt", "missing_text", whole_prompt, ("max_tokens",), WITHOUT_EFFECT_OF_COMPLETIONS
    ),
}


class Request(NamedTuple):
    """What a request asks, of whom, and how."""

    said: Conversation
    params: SamplingParams
    model: str | None


def request(cells: Mapping[str, object]) -> Request:
    """The request in a line with these values.

    Raises `RowError` of the kind `bad_request` for what is none, `unsupported` for what no run answers, and
    those of `conversation` and `whole_prompt`. A field that is null counts as absent, as it does for OpenAI.
    """
    body = cells.get(BODY)
    if not isinstance(body, Mapping):
        raise RowError("bad_request", f"there is no {BODY!r}, or it is no object; it has: {some(cells)}")
    endpoint = _endpoint(cells)
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    params = _params(given, endpoint.limits)
    model = given.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise _bad("model", model, "a string")
    asked = given.pop(endpoint.asks, None)
    _check_rest(given, endpoint.without_effect)
    if asked is None:
        raise RowError(endpoint.missing, f"{BODY!r} has no {endpoint.asks!r}")
    return Request(endpoint.read(endpoint.asks, asked), params, model)


def _endpoint(cells: Mapping[str, object]) -> Endpoint:
    """To what a request is sent."""
    if cells.get(METHOD) != "POST":
        raise RowError("bad_request", f"{METHOD!r} is {_told(cells.get(METHOD))}, not 'POST'")
    url = cells.get(URL)
    if not isinstance(url, str) or url not in ENDPOINTS:
        supported = " and ".join(map(repr, ENDPOINTS))
        raise RowError("unsupported", f"{URL!r} is {_told(url)}; supported are {supported}")
    return ENDPOINTS[url]


def _check_rest(given: Mapping[str, Any], without_effect: Mapping[str, tuple[Any, ...]]) -> None:
    """What is left of a body once it has been read must do nothing."""
    for name, value in given.items():
        if name not in without_effect:
            raise RowError("bad_request", f"{BODY!r} has an unknown field {name!r}")
        if value not in without_effect[name]:
            raise RowError("unsupported", f"{name!r} is {_told(value)}, which is not supported")


def _params(given: dict[str, Any], names: tuple[str, ...]) -> SamplingParams:
    """What a body says of its answer, whose fields are taken out of it; `names` are those of its limit."""
    limits = [name for name in names if name in given]
    if len(limits) > 1:
        raise RowError("bad_request", f"both {' and '.join(map(repr, limits))} are given; give one of them")
    form, stop = _form(given.pop("response_format", None)), _stops(given.pop("stop", None))
    if form is not None and stop is not None:
        raise RowError("unsupported", "'stop' beside 'response_format': an answer ends where its form does")
    return SamplingParams(
        max_new_tokens=_integer(limits[0], given.pop(limits[0]), least=1) if limits else None,
        temperature=_number(given, "temperature", most=MOST_TEMPERATURE),
        top_p=_number(given, "top_p", most=1, above_least=True),
        **_of_vllm(given),
        seed=_integer("seed", given.pop("seed")) if "seed" in given else None,
        stop=stop,
        response_format=form,
    )


def _of_vllm(given: dict[str, Any]) -> dict[str, Any]:
    """What its batch runner reads in the same files, and OpenAI's does not know."""
    top_k = _integer("top_k", given.pop("top_k"), least=-1) if "top_k" in given else None
    return {
        "top_k": None if top_k is None else max(top_k, 0),  # -1 is all tokens, too
        "min_p": _number(given, "min_p", most=1),
        "repetition_penalty": _number(given, "repetition_penalty", most=MOST_PENALTY, above_least=True),
    }


def _form(value: object) -> ResponseFormat | None:
    """The form that an answer is to have; None where any text will do."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise _bad("response_format", value, "an object of the type 'text', 'json_object' or 'json_schema'")
    form = JSON_OBJECT
    if kind == "json_schema":
        assert isinstance(value, Mapping)
        told = value.get("json_schema")
        schema = told.get("schema") if isinstance(told, Mapping) else None
        if not isinstance(schema, dict):
            raise _bad("response_format", value, "one with an object 'json_schema' that has a 'schema'")
        form = json_schema_format(schema)
    try:
        check_format(form, "'response_format'")
    except ConfigError as error:
        raise RowError("unsupported", str(error)) from error
    return form


def _integer(name: str, value: object, *, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise _bad(name, value, "an integer" if least is None else f"an integer of at least {least}")
    return value


def _number(given: dict[str, Any], name: str, *, most: float, above_least: bool = False) -> float | None:
    """A number from 0, or above it, to `most`; None where none is given."""
    value = given.pop(name, None)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= most or (above_least and value == 0):
        raise _bad(name, value, f"a number {'above' if above_least else 'from'} 0 to {most}")
    return float(value)


def _stops(value: object) -> tuple[str, ...] | None:
    """The texts that end an answer; None where none are given."""
    texts = [value] if isinstance(value, str) else value
    if texts is None or texts == []:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise _bad("stop", value, f"a text, or a list of up to {MOST_STOPS} texts, none of them empty")
    if len(texts) > MOST_STOPS:
        raise RowError("bad_request", f"'stop' has {len(texts)} texts, more than {MOST_STOPS}")
    return tuple(texts)


def _bad(name: str, value: object, wanted: str) -> RowError:
    return RowError("bad_request", f"{name!r} is {_told(value)}, not {wanted}")


def _told(value: object) -> str:
    """A value in a message: its beginning, if it is long."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= LONGEST_TOLD else f"{text[:LONGEST_TOLD]}..."
