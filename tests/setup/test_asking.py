"""Columns and question of a run whose settings leave them to the input."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.asking import (
    as_before,
    as_begun,
    columns_decided,
    is_list,
    is_text,
    settled,
    with_lengths,
)


def decided(types, template_asks=None, **values):
    found = settled(DataSettings(**values), types, template_asks=template_asks)
    data = found.settings
    return data.text_column, data.question_column, data.summarise, data.id_column


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"text": "string", "question": "string"}, ("text", "question", None, None)),
        ({"text": "string", "body": "string", "id": "int64"}, ("text", None, "short", "id")),
        ({"contents": "large_string", "title": "string"}, ("contents", None, "short", None)),
        ({"body": "dictionary<values=string, indices=int8, ordered=0>"}, ("body", None, "short", None)),
        ({"body": "int64", "content": "string_view"}, ("content", None, "short", None)),
        ({"title": "string"}, ("text", None, "short", None)),  # which the rows will tell
        (None, ("text", None, "short", None)),  # as of lines that are no JSON
        ({"id": "string", "text": "null", "question": "null"}, ("text", "question", None, "id")),
    ],
)
def test_columns_are_found_by_name_and_type(types, expected):
    assert decided(types) == expected


def test_what_is_named_stands():
    types = {"text": "string", "question": "string", "id": "string", "prompt": "string", "key": "string"}
    assert decided(types, text_column="key", id_column="key") == ("key", "question", None, "key")
    assert decided(types, question="Why?") == ("text", None, None, "id")
    assert decided(types, summarise="page") == ("text", None, "page", "id")
    assert decided({"text": "string", "prompt": "string"}, question_column="prompt")[1] == "prompt"


@pytest.mark.parametrize(
    ("types", "says"),
    [
        ({"body": "string", "document": "string"}, "'document' and 'body' could each be the document"),
        ({"text": "string", "query": "string"}, "--question-column query asks it, --summarise leaves it"),
        ({"text": "string", "Question": "string"}, "--question-column Question asks it"),
        ({"text": "string", "questions": "list<item: string>"}, "--questions-column questions asks it"),
        ({"text": "string", "question": "large_list<item: string>"}, "--questions-column question asks each"),
    ],
)
def test_what_could_be_meant_otherwise_is_refused(types, says):
    with pytest.raises(ConfigError) as caught:
        decided(types)
    assert says in str(caught.value)


def test_a_template_that_has_no_place_for_a_question_asks_none():
    types = {"text": "string", "question": "string", "query": "string"}
    assert decided(types, template_asks=False) == ("text", None, None, None)
    assert decided(types, template_asks=True)[1] == "question"
    assert decided({"text": "string"}, template_asks=True) == ("text", None, None, None)


def test_what_was_decided_is_told_and_comes_back_whatever_the_input_is():
    found = settled(DataSettings(), {"body": "string", "id": "string"})
    assert (found.takes_ids, found.asks_summary) == (True, True)
    assert [text.split(" (")[0] for text in found.notes] == [
        "the document is the column 'body'",
        "no question is given and there is no column 'question': a short summary is asked for",
    ]
    again = as_begun(DataSettings(), columns_decided(found))
    assert (again.settings, again.takes_ids, again.notes) == (found.settings, True, ())
    # the same column named is the same; another is told as another setting
    assert as_begun(DataSettings(id_column="id"), columns_decided(found)).takes_ids
    assert not as_begun(DataSettings(id_column="key"), columns_decided(found)).takes_ids
    before = as_before(DataSettings())
    assert (before.settings.text_column, before.settings.is_asked, before.takes_ids) == ("text", False, False)


@pytest.mark.parametrize(
    ("asked", "given", "expected"),
    [
        ({"question": "?"}, {}, (128, "error")),
        ({"summarise": "short"}, {}, (512, "split")),
        ({"summarise": "short"}, {"max_new_tokens": 128, "on_overlong": "skip"}, (128, "skip")),
    ],
)
def test_a_summary_is_longer_and_of_parts(asked, given, expected):
    config = with_lengths(BatchConfig(input=("a",), output="b.parquet", **asked, **given))
    assert (config.max_new_tokens, config.on_overlong) == expected


@pytest.mark.parametrize(
    ("kind", "text", "many"),
    [
        ("string", True, False),
        ("large_string", True, False),
        ("string_view", True, False),
        ("dictionary<values=large_string, indices=int32, ordered=0>", True, False),
        ("dictionary<values=int64, indices=int32, ordered=0>", False, False),
        ("list<item: string>", False, True),
        ("fixed_size_list<item: string>[2]", False, True),
        ("struct<string: int64>", False, False),
    ],
)
def test_types_are_told_by_their_names(kind, text, many):
    assert (is_text(kind), is_list(kind)) == (text, many)
