"""Requests of OpenAI's Batch API: what one says, what is refused of it, and when lines are taken for some."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.requests import IGNORED, WITHOUT_EFFECT, WITHOUT_EFFECT_OF_COMPLETIONS, request
from pipeline.inputs.source import open_source
from pipeline.records import AS_THE_RUN, Document, Row, RowError, SamplingParams, Turn
from pipeline.settings.data_settings import DataSettings
from pipeline.setup.asking import as_begun, columns_decided, settled
from pipeline.setup.new_rows import row_hash

SAID = [{"role": "user", "content": "A long document of some words.\n\nWhy?"}]
TOOL = {"type": "function", "function": {"name": "look"}}
IMAGE = [{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}]


def cells(body=None, **values):
    body = {"model": "m", "messages": SAID} if body is None else body
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, **values}
    return {name: value for name, value in line.items() if value is not ...}


def asked(**fields):
    return request(cells({"messages": SAID, **fields}))


def prompted(prompt, **fields):
    return request(cells({"prompt": prompt, **fields}, url="/v1/completions"))


def test_a_request_says_a_conversation_and_what_it_wants_of_the_answer():
    made = asked(model="m", max_tokens=5, temperature=1, top_p=0.5, seed=-3, stop="x")
    assert (made.said.text, made.said.question, made.model) == ("A long document of some words.", "Why?", "m")
    assert made.params == SamplingParams(max_new_tokens=5, temperature=1.0, top_p=0.5, seed=-3, stop=("x",))
    assert asked(max_completion_tokens=7, stop=["a", "b"]).params == SamplingParams(
        max_new_tokens=7, stop=("a", "b")
    )


def test_what_vllm_reads_besides_is_read_too():
    made = asked(top_k=5, min_p=0.1, repetition_penalty=1.2).params
    assert made == SamplingParams(top_k=5, min_p=0.1, repetition_penalty=1.2)
    assert asked(top_k=-1).params == asked(top_k=0).params == SamplingParams(top_k=0)


def test_what_is_null_or_without_effect_is_as_good_as_absent():
    names = ("max_tokens", "temperature", "top_p", "seed", "stop", "model", "tools", "response_format")
    names += ("top_k", "min_p", "repetition_penalty")
    neutral = {name: values[0] for name, values in WITHOUT_EFFECT.items() if values}
    ignored = {name: {"any": "thing"} for name in IGNORED}
    made = asked(**dict.fromkeys(names))
    assert made == asked(**neutral) == asked(**ignored) == asked(stop=[]) == asked()
    assert made.params == AS_THE_RUN


def test_a_completion_says_a_prompt():
    made = prompted("A long document.\n\nWhy?", model="m", max_tokens=5, stop="x", seed=1)
    assert (made.said.text, made.said.question, made.model) == ("A long document.", "Why?", "m")
    assert made.said.turns == (Turn("whole", ("document", "question"), "\n\n"),)
    assert made.params == SamplingParams(max_new_tokens=5, seed=1, stop=("x",))
    assert prompted(["Why?\n\nA long document."]).said == prompted("Why?\n\nA long document.").said
    assert prompted("Why?\n\nA long document.").said.turns[0].texts == ("question", "document")
    neutral = {name: values[0] for name, values in WITHOUT_EFFECT_OF_COMPLETIONS.items() if values}
    assert prompted("a", **neutral, logprobs=None, user="u") == prompted("a")


REFUSED = {
    "no prompt": (cells({}, url="/v1/completions"), "missing_text", "'body' has no 'prompt'"),
    "messages for a prompt": (
        cells(url="/v1/completions"),
        "bad_request",
        "'body' has an unknown field 'messages'",
    ),
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
    "another address": (
        cells(url="/v1/embeddings"),
        "unsupported",
        "'url' is '/v1/embeddings'; supported are '/v1/chat/completions' and '/v1/completions'",
    ),
    "no address": (cells(url=...), "unsupported", "'url' is missing; supported are"),
    "an address that is no text": (cells(url=["/v1/completions"]), "unsupported", "'url' is ['/v1/comp"),
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
    "top_k of a fraction": ({"top_k": 1.5}, "'top_k' is 1.5, not an integer of at least -1"),
    "min_p above 1": ({"min_p": 1.1}, "'min_p' is 1.1, not a number from 0 to 1"),
    "a penalty of nothing": (
        {"repetition_penalty": 0},
        "'repetition_penalty' is 0, not a number above 0 to 100",
    ),
    "an unknown field": ({"best_of": 5}, "'body' has an unknown field 'best_of'"),
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


PROMPTS = {
    "tokens": ([1, 2, 3], "unsupported", "'prompt' is numbers of tokens; give the prompt as a text"),
    "a list of tokens": ([[1, 2], [3]], "unsupported", "'prompt' is numbers of tokens"),
    "several": (["a", "b"], "unsupported", "'prompt' has 2 prompts, which is not supported"),
    "a number and a text": (["a", 1], "bad_request", "'prompt' is no text, or list of one"),
    "an object": ({"text": "a"}, "bad_request", "'prompt' is no text, or list of one"),
    "no text": ("", "empty_document", "'prompt' is empty"),
    "a list of nothing": ([], "empty_document", "'prompt' is empty"),
    "white space": (" \n\n ", "empty_document", "'prompt' is empty"),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_that_are_no_text_are_refused(kind):
    prompt, word, message = PROMPTS[kind]
    with pytest.raises(RowError) as caught:
        prompted(prompt)
    assert (caught.value.kind, message in str(caught.value)) == (word, True)


OF_COMPLETIONS = {"best_of": 3, "echo": True, "logprobs": 0, "suffix": "end", "n": 2, "stream": True}


@pytest.mark.parametrize("name", OF_COMPLETIONS)
def test_what_is_not_supported_of_completions_is_refused_by_name(name):
    with pytest.raises(RowError, match=f"^'{name}' is .*, which is not supported$") as caught:
        prompted("a", **{name: OF_COMPLETIONS[name]})
    assert caught.value.kind == "unsupported"


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
        {"top_k": 5},
        {"min_p": 0.5},
        {"repetition_penalty": 0.5},
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


def test_of_a_request_its_address_is_copied_and_what_stands_beside_it(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [cells(), cells(custom_id="b", note=1.5), cells(custom_id=...)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_source([path], Columns(requests=True, id="custom_id"))
    first, second, third = source
    assert first.source.passthrough.to_pylist() == [{"url": "/v1/chat/completions", "extra": None}]
    assert second.source.passthrough["extra"].to_pylist() == ['{"note": 1.5}']
    assert (third.kind, third.source.id) == ("missing_id", "in.jsonl:2")
    kept = open_source([path], Columns(requests=True, id="custom_id", keep={"note": "float"}))
    assert kept.schema.names == ["url", "note"]


def test_requests_are_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(cells()) + "\n")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(InputError, match=r"b\.txt: requests of OpenAI's Batch API are JSON lines"):
        open_source([tmp_path / "a.jsonl", tmp_path / "b.txt"], Columns(requests=True, id="custom_id"))
