"""Values of JSON as Arrow values, of the types that a schema says."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.values.json_answers import is_valid, schema_text
from pipeline.values.typed import json_type_of

TEXT, WHOLE, NUMBER, FLAG = pa.large_string(), pa.int64(), pa.float64(), pa.bool_()
POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}}
POINT_TYPE = pa.struct([("x", NUMBER), ("y", NUMBER)])
TREE = {
    "$defs": {"node": {"properties": {"name": {"type": "string"}, "next": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, TEXT),
        ({"type": "string", "format": "date"}, TEXT),
        ({"type": "integer"}, WHOLE),
        ({"type": "number"}, NUMBER),
        ({"type": "boolean"}, FLAG),
        ({"type": ["integer", "null"]}, WHOLE),
        ({"type": ["integer", "number"]}, NUMBER),
        ({"enum": ["a", "b", None]}, TEXT),
        ({"enum": [1, 2]}, WHOLE),
        ({"enum": [1, 2.5]}, NUMBER),
        ({"const": True}, FLAG),
        ({"type": "array", "items": {"type": "integer"}}, pa.list_(WHOLE)),
        ({"items": {"type": "array", "items": POINT}}, pa.list_(pa.list_(POINT_TYPE))),
        (POINT, POINT_TYPE),
        ({"properties": {"at": POINT}}, pa.struct([("at", POINT_TYPE)])),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, WHOLE),
        ({"oneOf": [POINT, {"const": None}]}, POINT_TYPE),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, NUMBER),
        ({"allOf": [{"$ref": "#/$defs/p"}], "$defs": {"p": POINT}}, POINT_TYPE),
        ({"type": "object", "anyOf": [{"required": ["x"]}], "properties": POINT["properties"]}, POINT_TYPE),
        (TREE, pa.struct([("name", TEXT), ("next", TEXT)])),
    ],
)
def test_types(schema, kind):
    assert json_type_of(schema).arrow == kind


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": ["integer", "string"]},
        {"enum": [1, "a"]},
        {"enum": [[1], [2]]},
        {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"type": "array"},
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}},
        {"$ref": "#"},
        {"type": "null"},
    ],
)
@pytest.mark.parametrize(
    ("value", "text"), [({"a": [1, None]}, '{"a": [1, null]}'), ("é", '"é"'), (3, "3"), (None, None)]
)
def test_what_has_no_one_type_is_json_in_a_string(schema, value, text):
    kind = json_type_of(schema)
    assert kind.arrow == TEXT
    assert kind.fit(value) == text


@pytest.mark.parametrize(
    ("schema", "value", "fitted"),
    [
        ({"type": "string"}, "a", "a"),
        ({"type": "string"}, 3, None),
        ({"type": "integer"}, 3.0, 3),
        ({"type": "integer"}, 3.5, None),
        ({"type": "integer"}, True, None),
        ({"type": "integer"}, 2**63 - 1, 2**63 - 1),
        ({"type": "integer"}, 2**63, None),
        ({"type": "integer"}, float("inf"), None),  # as 1e999 is read
        ({"type": "number"}, 3, 3.0),
        ({"type": "number"}, 10**400, None),
        ({"type": "number"}, float("inf"), None),
        ({}, [float("inf")], None),
        ({"type": "number"}, "3", None),
        ({"type": "boolean"}, False, False),
        ({"type": "boolean"}, 0, None),
        ({"items": {"type": "integer"}}, [1, "a", None], [1, None, None]),
        ({"items": {"type": "integer"}}, 1, None),
        (POINT, {"x": 1, "z": 2}, {"x": 1.0, "y": None}),
        (POINT, [1, 2], None),
        (TREE, {"name": "a", "next": {"name": "b"}}, {"name": "a", "next": '{"name": "b"}'}),
    ],
)
def test_values(schema, value, fitted):
    kind = json_type_of(schema)
    made = kind.fit(value)
    assert made == fitted
    assert type(made) is type(fitted)
    assert pa.array([made], kind.arrow).to_pylist() == [fitted]


NAMES = st.text(max_size=3)
LEAVES = st.sampled_from(
    [{}, {"enum": ["a", 1]}, *({"type": name} for name in ("string", "integer", "number", "boolean", "null"))]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda named: {"type": "object", "properties": named}, st.dictionaries(NAMES, inner)),
        st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)


@given(schema=SCHEMAS, values=st.lists(VALUES, max_size=4))
@settings(max_examples=200)
def test_whatever_is_answered_fits_and_comes_back_from_parquet(schema, values):
    kind = json_type_of(schema)
    table = pa.table({"value": pa.array([kind.fit(value) for value in values], kind.arrow)})
    content = io.BytesIO()
    pq.write_table(table, content)
    assert pq.read_table(content)["value"].to_pylist() == table["value"].to_pylist()


@given(schema=SCHEMAS.filter(lambda schema: "anyOf" not in str(schema)), value=VALUES)
def test_what_is_valid_has_a_value(schema, value):
    """But for an integer or a number that Arrow has no room for, and NaN, which is no JSON."""
    assume(not (isinstance(value, int | float) and not -(2**63) <= value < 2**63))
    text = json.dumps(value)
    if value is not None and is_valid(text, schema_text(schema)):
        assert json_type_of(schema).fit(value) is not None
