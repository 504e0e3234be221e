"""Requests of OpenAI's Batch API: what one says, what is refused of it, and when lines are taken for some."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.requests import IGNORED, WITHOUT_EFFECT, request
from pipeline.inputs.source import open_source
from pipeline.records import AS_THE_RUN, Document, Row, RowError, SamplingParams
from pipeline.settings.data_settings import DataSettings
from pipeline.setup.asking import as_begun, columns_decided, settled
from pipeline.setup.intake import row_hash

SAID = [{"role": "user", "content": "A long document of some words.\n\nWhy?"}]
TOOL = {"type": "function", "function": {"name": "look"}}
IMAGE = [{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]


def cells(body=None, **values):
    body = {"model": "m", "messages": SAID} if body is None else body
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, **values}
    return {name: value for name, value in line.items() if value is not ...}


def asked(**fields):
    return request(cells({"messages": SAID, **fields}))


def test_a_request_says_a_conversation_and_what_it_wants_of_the_answer():
    made = asked(model="m", max_tokens=5, temperature=1, top_p=0.5, seed=-3, stop="x")
    assert (made.said.text, made.said.question, made.model) == ("A long document of some words.", "Why?", "m")
    assert made.params == SamplingParams(max_new_tokens=5, temperature=1.0, top_p=0.5, seed=-3, stop=("x",))
    assert asked(max_completion_tokens=7, stop=["a", "b"]).params == SamplingParams(
        max_new_tokens=7, stop=("a", "b")
    )


def test_what_is_null_or_without_effect_is_as_good_as_absent():
    names = ("max_tokens", "temperature", "top_p", "seed", "stop", "model", "tools", "response_format")
    neutral = {name: values[0] for name, values in WITHOUT_EFFECT.items() if values}
    ignored = {name: {"any": "thing"} for name in IGNORED}
    made = asked(**dict.fromkeys(names))
    assert made == asked(**neutral) == asked(**ignored) == asked(stop=[]) == asked()
    assert made.params == AS_THE_RUN


REFUSED = {
    "an empty body": (cells({}), "missing_messages", "'body' has no 'messages'"),
    "no body": (cells(body=...), "bad_request", "there is no 'body', or it is no object; it has: custom_id"),
    "a body of text": (cells("text"), "bad_request", "'body', or it is no object"),
    "a line of another kind": (
        {"text": "plain"},
        "bad_request",
        "there is no 'body', or it is no object; it has: text",
    ),
    "no method": (cells(method=...), "bad_request", "'method' is missing, not 'POST'"),
    "another method": (cells(method="GET"), "bad_request", "'method' is 'GET', not 'POST'"),
    "another address": (cells(url="/v1/embeddings"), "unsupported", "'url' is '/v1/embeddings'"),
    "no messages in the list": (cells({"messages": []}), "bad_messages", "'messages' is no list of messages"),
    "an image": (
        cells({"messages": [{"role": "user", "content": IMAGE}]}),
        "unsupported",
        "message 0 of 'messages' has a part of the type 'image_url'",
    ),
}
BAD_FIELDS = {
    "temperature as text": ({"temperature": "0.5"}, "'temperature' is '0.5', not a number from 0 to 2"),
    "temperature as truth": ({"temperature": True}, "'temperature' is True"),
    "temperature too high": ({"temperature": 2.5}, "'temperature' is 2.5"),
    "temperature not a number": ({"temperature": float("nan")}, "'temperature' is nan"),
    "top_p of nothing": ({"top_p": 0}, "'top_p' is 0, not a number above 0 to 1"),
    "negative length": ({"max_tokens": -1}, "'max_tokens' is -1, not an integer of at least 1"),
    "length of a fraction": ({"max_completion_tokens": 1.5}, "'max_completion_tokens' is 1.5"),
    "two lengths": ({"max_tokens": 1, "max_completion_tokens": 1}, "give one of them"),
    "seed as text": ({"seed": "7"}, "'seed' is '7', not an integer"),
    "five stops": ({"stop": list("abcde")}, "'stop' has 5 texts, more than 4"),
    "an empty stop": ({"stop": [""]}, "'stop' is [''], not a text, or a list of up to 4 texts"),
    "a stop of numbers": ({"stop": [1]}, "'stop' is [1]"),
    "model as a number": ({"model": 3}, "'model' is 3, not a string"),
    "an unknown field": ({"top_k": 5}, "'body' has an unknown field 'top_k'"),
    "a long value": ({"seed": "x" * 500}, f"'seed' is '{'x' * 59}..., not an integer"),
}
UNSUPPORTED = {
    "tools": [TOOL],
    "tool_choice": "required",
    "n": 2,
    "logprobs": True,
    "top_logprobs": 3,
    "stream": True,
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy"},
    "logit_bias": {"5": 1},
    "frequency_penalty": 0.5,
    "reasoning_effort": "high",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_lines_that_are_no_request_are_refused(kind):
    line, word, message = REFUSED[kind]
    with pytest.raises(RowError) as caught:
        request(line)
    assert caught.value.kind == word
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_fields_of_a_wrong_type_or_range_are_refused_by_name(kind):
    fields, message = BAD_FIELDS[kind]
    with pytest.raises(RowError) as caught:
        asked(**fields)
    assert caught.value.kind == "bad_request"
    assert message in str(caught.value)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(name):
    with pytest.raises(RowError, match=f"^'{name}' is .*, which is not supported$") as caught:
        asked(**{name: UNSUPPORTED[name]})
    assert caught.value.kind == "unsupported"


def hashed(**fields):
    made = asked(**fields)
    source = Row(row=0, id="a", place="", question=made.said.question, params=made.params)
    return row_hash(Document(source=source, text=made.said.text))


def test_what_a_request_says_of_its_answer_belongs_to_its_hash():
    different = [
        {},
        {"max_tokens": 5},
        {"max_tokens": 6},
        {"temperature": 0},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 5},
        {"stop": "a"},
        {"stop": ["a", "b"]},
    ]
    assert len({hashed(**fields) for fields in different}) == len(different)
    assert hashed() == hashed(model="another", user="u", n=1)
    assert hashed(temperature=1) == hashed(temperature=1.0)
    assert hashed(stop="a") == hashed(stop=["a"])


TYPES = {"custom_id": "string", "method": "string", "url": "string", "body": "struct<model: string>"}
TAKEN = {
    "whole": TYPES,
    "without an id": {name: kind for name, kind in TYPES.items() if name != "custom_id"},
    "with more beside": {**TYPES, "metadata": "struct<>"},
    "with messages of several kinds": {**TYPES, "body": "null"},  # which have no type of Arrow
}
NOT_TAKEN = {
    "a log of texts": {**TYPES, "body": "string"},
    "with a document": {**TYPES, "text": "string"},
    "with no more than a body": {"body": "struct<a: int64>", "url": "string"},
}


@pytest.mark.parametrize("kind", [*TAKEN, *NOT_TAKEN])
def test_requests_are_known_by_the_keys_of_the_first_line(kind):
    found = settled(DataSettings(summarise=None), {**TAKEN, **NOT_TAKEN}[kind])
    assert found.requests == (kind in TAKEN)
    assert found.notes[0].startswith("the rows are requests") == (kind in TAKEN)


@pytest.mark.parametrize("given", [{"text_column": "body"}, {"question": "why?"}, {"id_column": "custom_id"}])
def test_a_named_column_or_question_means_other_rows(given):
    assert not settled(DataSettings(**given), TYPES).requests


def test_a_run_that_goes_on_takes_what_was_decided():
    begun = columns_decided(settled(DataSettings(), TYPES))
    assert as_begun(DataSettings(), begun).requests
    assert not as_begun(DataSettings(), columns_decided(settled(DataSettings(), {"text": "string"}))).requests


def test_nothing_of_a_request_is_copied_but_what_stands_beside_it(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [cells(), cells(custom_id="b", note=1.5), cells(custom_id=...)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_source([path], Columns(requests=True, id="custom_id"))
    first, second, third = source
    assert first.source.passthrough.to_pylist() == [{"extra": None}]
    assert second.source.passthrough.to_pylist() == [{"extra": '{"note": 1.5}'}]
    assert (third.kind, third.source.id) == ("missing_id", "in.jsonl:2")


def test_requests_are_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(cells()) + "\n")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(InputError, match=r"b\.txt: requests of OpenAI's Batch API are JSON lines"):
        open_source([tmp_path / "a.jsonl", tmp_path / "b.txt"], Columns(requests=True, id="custom_id"))
