"""JSON schemas that are read, or refused, and answers that are held against them."""

from __future__ import annotations

import json
import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.values.json_answers import checked_schema, is_valid, schema_in, schema_text

AMOUNT = {"type": "object", "properties": {"amount": {"type": "number"}}, "required": ["amount"]}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"amount": 3}', True),
        (' \n{"amount": 3}\n', True),
        ('{"amount": "3"}', False),
        ("{}", False),
        ("", False),
        ('The amount is {"amount": 3}', False),
        ('{"amount": 3} {"amount": 3}', False),
        ('{"amount": NaN}', False),
        ('{"amount": Infinity}', False),
        ('{"amount": 1' + "0" * 5000 + "}", False),  # which Python refuses to read
        ("[" * 100_000, False),
        ('```json\n{"amount": 3}\n```', True),
        ('```\n{"amount": 3}\n```\n', True),
        ('``` json\r\n{"amount": 3}\r\n```', True),
        ('  ```JSON  \n{"amount":\n3}```', True),
        ('```json\n{"amount": 3}', False),  # cut short
        ('Here:\n```json\n{"amount": 3}\n```', False),
        ('```json\n{"amount": 3}\n```\n```json\n{"amount": 4}\n```', False),
    ],
)
def test_an_answer_is_json_by_itself_or_in_one_fence(answer, expected):
    assert is_valid(answer, schema_text(AMOUNT)) is expected


def test_references_and_drafts_are_followed():
    schema = {"$defs": {"a/b": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/a~1b"}}}
    text = schema_text(checked_schema(schema, "--validate s.json"))
    assert is_valid('{"n": 3}', text)
    assert not is_valid('{"n": "3"}', text)
    tuples = {"items": [{"type": "integer"}, {"type": "string"}]}
    draft = {"$schema": "http://json-schema.org/draft-07/schema#", **tuples}
    assert is_valid('[1, "a"]', schema_text(checked_schema(draft, "s")))
    assert not is_valid('["a", 1]', schema_text(checked_schema(draft, "s")))


def test_an_id_of_the_schema_and_names_in_the_form_of_urls_change_nothing():
    schema = {"$id": "http://127.0.0.1:9/s.json", "$defs": {"a b": {"type": "integer"}}}
    text = schema_text(checked_schema(schema | {"items": {"$ref": "#/$defs/a%20b"}}, "s"))
    assert is_valid("[3]", text)
    assert not is_valid('["3"]', text)


def test_multiples_are_those_of_the_numbers_as_they_are_written():
    text = schema_text(checked_schema({"items": {"multipleOf": 0.01}}, "s"))
    assert is_valid(f"[{', '.join(f'{cents / 100:.2f}' for cents in range(500))}, 1{'0' * 400}, true]", text)
    assert not is_valid("[35.275]", text)
    assert not is_valid("[1e400]", text)


def test_a_schema_that_leads_back_to_itself_makes_no_answer_valid():
    assert not is_valid("1", schema_text(checked_schema({"$ref": "#"}, "s")))


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ([], "s is not a JSON schema: it must be an object"),
        (True, "s is not a JSON schema: it must be an object"),
        ({"type": "strin"}, "s is not a JSON schema at /type: 'strin' is not valid"),
        ({"properties": {"a": {"minimum": "3"}}}, "s is not a JSON schema at /properties/a/minimum: '3'"),
        ({"$ref": "http://127.0.0.1:9/s.json"}, r"s: \$ref 'http://127.0.0.1:9/s.json' leads nowhere in it"),
        ({"items": {"$ref": "#/$defs/gone"}}, r"s: \$ref '#/\$defs/gone' leads nowhere in it"),
        ({"$ref": "#/x", "x": {"properties": 3}}, r"s: #/x is not a JSON schema at /properties: 3 is not"),
        ({"$ref": "#/x", "x": "text"}, "s: #/x is not a JSON schema: 'text' is not of type"),
        ({"pattern": "("}, r"s is not a JSON schema at /pattern: '\(' is not a 'regex'"),
        ({"patternProperties": {r"\p{L}": {}}}, "s is not a JSON schema at /patternProperties: .* 'regex'"),
        ({"items": {"$id": "x"}}, r"s: a part of it has an \$id, which is not supported"),
        ({"const": float("inf")}, "s is not a JSON schema: Out of range float values"),
        ({"title": "half \ud800"}, "s is not a JSON schema: 'utf-8' codec can't encode"),
    ],
)
def test_what_no_answer_can_be_held_against_is_refused(schema, told):
    with pytest.raises(ConfigError, match=told):
        checked_schema(schema, "s")


def test_a_property_may_have_the_name_of_a_keyword():
    schema = {"properties": {"$ref": {"type": "string"}, "$id": {"type": "string"}}}
    assert checked_schema(schema, "s") is schema


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "--validate .*s.json cannot be read: .*No such file"),
        (b"{", "--validate .*s.json is not JSON: "),
        (b'{"type": "no"}', "--validate .*s.json is not a JSON schema at /type: 'no' is not valid"),
    ],
)
def test_a_file_that_is_no_schema_is_refused(tmp_path, content, told):
    path = tmp_path / "s.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        schema_in(str(path), "--validate")


def test_a_schema_stands_in_a_file_or_by_itself(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(AMOUNT, indent=4))
    assert schema_in(str(tmp_path / "s.json"), "--validate") == AMOUNT
    assert schema_in(f" {json.dumps(AMOUNT)}", "--validate") == AMOUNT
    with pytest.raises(ConfigError, match=r"^--validate is not a JSON schema at /type: "):
        schema_in('{"type": "no"}', "--validate")


def test_without_the_package_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.setitem(sys.modules, "jsonschema.exceptions", None)
    monkeypatch.setitem(sys.modules, "jsonschema.validators", None)
    with pytest.raises(ConfigError, match=r"s needs jsonschema: pip install 'marsinfer\[structured\]'"):
        checked_schema(AMOUNT, "s")
