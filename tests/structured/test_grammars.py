"""Forms that no answer can have are refused in a line, before there is a model."""

from __future__ import annotations

import math
import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.records import ResponseFormat
from pipeline.structured.grammars import check_format, choices_format, json_schema_format
from pipeline.values.schemas import read_schema

BAD_REGEXES = {
    "[0-9": "unclosed character class",
    "a{2": "unclosed counted repetition",
    "(?!a)b": "look-around, including look-ahead and look-behind, is not supported",
    r"(a)\1": "backreferences are not supported",
    r"[^\s\S]": "it matches nothing",
    "a[a&&b]": "it matches nothing",
}
BAD_SCHEMAS = {
    "an unknown type": ({"type": "word"}, "Invalid type: word"),
    "what is not known": ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
    "items that differ": ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
    "nothing between bounds": (
        {"type": "integer", "minimum": 5, "maximum": 3},
        "Unsatisfiable schema: minimum (5) is greater than maximum (3)",
    ),
    "an address": ({"$ref": "https://example.org/a"}, "is not present in a registry"),
    "a place that is not there": ({"$ref": "#/nope"}, "Pointer '/nope' does not exist"),
    "a pattern": ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    "an integer that would be another": (
        {"enum": [{"a": 2**53 + 1}]},
        f"enum has {2**53 + 1}, an integer that",
    ),
    "a float that would be another": (
        {"const": 123456789.12345679},
        "const has 123456789.12345679, a number",
    ),
    "no number": ({"const": math.nan}, "const has nan, a number that would be written as another"),
    "an integer beyond Rust's": ({"maximum": 2**64}, f"Value is not JSON serializable: {2**64}"),
    "a bound that is rounded out": (
        {"items": {"minimum": 2**53 + 1}},
        f"minimum {2**53 + 1} is an integer that",
    ),
    "items of two drafts": (
        {"prefixItems": [{}], "additionalItems": False},
        "beside additionalItems; say items",
    ),
    "names counted twice": ({"required": ["a"], "minProperties": 3}, "and one may be written twice"),
    "properties of a number": ({"properties": 3}, "properties must be an object"),
}


def refusal(form, place="--flag"):
    with pytest.raises(ConfigError) as caught:
        check_format(form, place)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("regex", BAD_REGEXES)
def test_regular_expressions(regex):
    assert refusal(ResponseFormat("regex", regex)) == f"--flag cannot be used: {BAD_REGEXES[regex]}"


@pytest.mark.parametrize("kind", BAD_SCHEMAS)
def test_schemas(kind):
    schema, message = BAD_SCHEMAS[kind]
    found = refusal(json_schema_format(schema))
    assert found.startswith("--flag cannot be used: ")
    assert message in found


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"$defs": {"a": {}}, "$ref": "#/$defs/a"},
        {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
        {"enum": [0.1, -0.0, 1e22, 2**53, 2**63 - 1]},
        {"required": ["a"], "minProperties": 2},
    ],
)
def test_schemas_that_can_be_used(schema):
    check_format(json_schema_format(schema), "--flag")


def test_without_the_library_the_extra_is_named_and_choices_need_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    message = refusal(ResponseFormat("regex", "only here"), "--regex")
    assert message == "--regex needs llguidance: pip install 'marsinfer[structured]'"
    check_format(choices_format(("a", "b")), "--choices")


def test_a_schema_is_read_from_a_file_or_stands_for_itself(tmp_path):
    path = tmp_path / "s.json"
    path.write_text('\ufeff{"type": "object", "properties": {"b": {}, "a": {}}}', encoding="utf-8")
    schema = read_schema(str(path))
    assert list(schema["properties"]) == ["b", "a"]
    assert read_schema(' {"type": "object"}') == {"type": "object"}


BAD_FILES = {
    "[1]": "is no JSON schema: it must be an object, {...}",
    '"x"': "is no JSON schema",
    "{": "is not JSON: ",
    "": "is not JSON: ",
    "[" * 100_000: "is not JSON: ",
}


@pytest.mark.parametrize("content", BAD_FILES, ids=range(len(BAD_FILES)))
def test_files_that_hold_none(tmp_path, content):
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_schema(str(path))
    assert str(caught.value).startswith(f"--json-schema {path} {BAD_FILES[content]}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"^--json-schema .*nope.json cannot be read: .*No such file"):
        read_schema(str(tmp_path / "nope.json"))
    with pytest.raises(ConfigError, match=r"^--json-schema is not JSON: "):
        read_schema("{oops")
