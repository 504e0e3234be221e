"""Files of questions with names: what they may be, and what is refused in a line."""

from __future__ import annotations

import json

import pytest

from pipeline.errors import ConfigError
from pipeline.settings.questions import AskedQuestion, read_questions, refuse_columns

LAW = {"name": "law", "question": "Which law governs?"}
SCHEMA = {"type": "object", "properties": {"amount": {"type": "number"}}}
VALUE = {"name": "value", "question": "What is it worth?", "schema": SCHEMA, "max_new_tokens": 9}
TOML = """\
[[questions]]
name = "law"
question = "Which law governs?"

[[questions]]
name = "value"
question = "What is it worth?"
max_new_tokens = 9

[questions.schema]
type = "object"
properties.amount.type = "number"
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.json", json.dumps([LAW, VALUE])),
        ("q.JSON", json.dumps({"questions": [LAW, VALUE]})),
        ("q.jsonl", f"{json.dumps(LAW)}\n\n{json.dumps(VALUE)}"),
        ("q.toml", TOML),
    ],
)
def test_all_forms_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_questions(str(tmp_path / name)) == (
        AskedQuestion(name="law", question="Which law governs?"),
        AskedQuestion(name="value", question="What is it worth?", schema=SCHEMA, max_new_tokens=9),
    )


def test_the_file_of_a_schema_is_beside_that_of_questions(tmp_path):
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "amount.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "q.json").write_text(json.dumps([{**LAW, "schema": "schemas/amount.json"}]))
    assert read_questions(str(tmp_path / "q.json"))[0].schema == SCHEMA


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "has no questions: it must be a list, or a table 'questions', of objects"),
        ({"question": []}, "must be a list, or a table 'questions'"),
        (3, "must be a list"),
        ([3], "question 1 is no object"),
        ([{"question": "?"}], "question 1 has no 'name': it must be a text that is not empty"),
        ([{**LAW, "question": " "}], r"question 1 \(law\) has no 'question'"),
        ([{**LAW, "question": ["a"]}], r"question 1 \(law\) has no 'question'"),
        ([{**LAW, "question": "half \ud800"}], r"question 1 \(law\): 'question' has half of a"),
        ([LAW, {**LAW, "name": "a b"}], "question 2: the name 'a b' is none for a column"),
        ([{**LAW, "name": "2nd"}], "the name '2nd' is none for a column"),
        ([{**LAW, "name": "a#b"}], "the name 'a#b' is none for a column"),
        ([{**LAW, "name": "ID"}], "the name 'ID' is that of a column beside the questions"),
        ([LAW, VALUE, {**LAW, "name": "Law"}], "the name 'Law' stands twice|the name 'law' stands twice"),
        ([{**LAW, "shema": {}}], r"question 1 has an unknown 'shema' \(did you mean 'schema'\?\)"),
        ([{**LAW, "max_new_tokens": 0}], r"question 1 \(law\): 'max_new_tokens' is 0, not a whole number"),
        ([{**LAW, "max_new_tokens": True}], "'max_new_tokens' is True, not a whole number"),
        ([{**LAW, "schema": {"type": "no"}}], r"question 1 \(law\): 'schema' is not a JSON schema at /type"),
        ([{**LAW, "schema": "gone.json"}], r"question 1 \(law\): schema .*gone.json cannot be read"),
        ([{**LAW, "schema": 3}], r"question 1 \(law\): 'schema' is not a JSON schema: it must be an object"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, content, told):
    path = tmp_path / "q.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=told) as caught:
        read_questions(str(path))
    assert str(caught.value).startswith(f"--questions {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("q.json", None, "cannot be read: .*No such file"),
        ("q.json", b"\xff", "cannot be read: .*utf-8"),
        ("q.json", b"[", "is no .json: "),
        ("q.jsonl", b'{"name": "a"}\n{', "is no .jsonl: line 2: "),
        ("q.toml", b"a", "is no .toml: "),
        ("q.csv", b"name,question", "has an extension that is not known; it may be .json, .jsonl, .toml"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--questions .*{name} {told}"):
        read_questions(str(tmp_path / name))


def test_the_name_of_a_copied_column_is_refused():
    asked = [AskedQuestion(name="law", question="?")]
    refuse_columns(asked, ["year", "laws"])
    with pytest.raises(ConfigError, match="the question 'law' has the name of a column that is copied"):
        refuse_columns(asked, ["year", "LAW"])
