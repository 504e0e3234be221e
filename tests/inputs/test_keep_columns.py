"""Columns that the user chose to copy, with the types that they asked for."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns, parse_keep_columns
from pipeline.inputs.source import open_source


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def copied(source):
    """The pass-through rows as one table."""
    return pa.Table.from_batches([record.source.passthrough for record in source], schema=source.schema)


def refusal(inputs, columns):
    with pytest.raises(InputError) as caught:
        open_source(inputs, columns)
    return str(caught.value)


def test_kept_columns_only(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "x": ["5"], "y": [1], "z": [2]}), tmp_path / "t.parquet")
    source = open_source([tmp_path / "t.parquet"], Columns(keep=parse_keep_columns("z,x:int,text")))
    assert source.schema == pa.schema([("z", pa.int64()), ("x", pa.int64()), ("text", pa.string())])
    assert copied(source).to_pylist() == [{"z": 2, "x": 5, "text": "a"}]


def test_keeping_nothing(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "x": ["5"]}), tmp_path / "a.parquet")
    write_lines(tmp_path / "b.jsonl", {"text": "b", "x": 2})
    source = open_source([tmp_path], Columns(keep={}))
    assert source.schema.names == []
    assert [record.source.passthrough for record in source] == [None, None]


def test_a_mapping_is_taken_as_keep(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "x": ["5"]}), tmp_path / "t.parquet")
    source = open_source([tmp_path / "t.parquet"], Columns(keep={"x": "float"}))
    assert copied(source).to_pylist() == [{"x": 5.0}]


def test_kept_names_must_exist_in_some_file(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "x": ["5"]}), tmp_path / "t.parquet")
    expected = "there is no column 'no' to keep; it has: text, x"
    assert refusal([tmp_path / "t.parquet"], Columns(keep=parse_keep_columns("x,no"))) == expected


def test_text_documents_have_no_columns_to_keep(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    expected = "there is no column 'x' to keep; text documents have none"
    assert refusal([tmp_path / "a.txt"], Columns(keep=parse_keep_columns("x"))) == expected
    assert open_source([tmp_path / "a.txt"], Columns()).schema.names == []


def test_an_impossible_cast_is_refused_at_once(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "x": [[1]]}), tmp_path / "t.parquet")
    message = refusal([tmp_path / "t.parquet"], Columns(keep=parse_keep_columns("x:int")))
    assert message.startswith("t.parquet: column 'x' is list<element: int64> and cannot become int64 (")
    assert message.endswith("; keep it without a type")


def test_values_of_a_table_that_do_not_fit_are_failures(tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "x": ["1", "one", None], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "t.parquet")
    good, bad, null = open_source([tmp_path / "t.parquet"], Columns(keep=parse_keep_columns("x:int,n")))
    assert good.source.passthrough.to_pylist() == [{"x": 1, "n": 1}]
    assert null.source.passthrough.to_pylist() == [{"x": None, "n": 3}]
    assert (bad.kind, bad.source.passthrough) == ("bad_value", None)
    assert bad.message == (
        "t.parquet row 1: 'x' does not fit int64: Failed to parse string: 'one' as a scalar of type int64; "
        "keep it as another type, or not at all"
    )


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("int", 5, 5),
        ("int", "5", 5),
        ("int", 5.0, 5),
        ("int", None, None),
        ("float", 5, 5.0),
        ("bool", True, True),
        ("string", "s", "s"),
        ("string", 5, "5"),
        ("string", ["a"], '["a"]'),
        ("string", {"a": None}, '{"a": null}'),
        ("date32", "2020-01-02", datetime.date(2020, 1, 2)),
        ("timestamp[s]", "2020-01-02T03:04:05", datetime.datetime(2020, 1, 2, 3, 4, 5)),
        (None, 5, "5"),
    ],
)
def test_values_of_lines_become_their_type(tmp_path, kind, value, expected):
    write_lines(tmp_path / "c.jsonl", {"text": "a", "x": value})
    source = open_source([tmp_path / "c.jsonl"], Columns(keep={"x": kind}))
    assert copied(source).to_pylist() == [{"x": expected}]


def test_keys_that_a_line_lacks_are_null(tmp_path):
    write_lines(tmp_path / "c.jsonl", {"text": "a"})
    assert copied(open_source([tmp_path / "c.jsonl"], Columns(keep={"x": "int"}))).to_pylist() == [
        {"x": None}
    ]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", 5.5),
        ("int", "x"),
        ("int", [1]),
        ("int", {"a": 1}),
        ("int", 2**70),
        ("int8", 300),
        ("int", [1, "a"]),
        ("int", True),
        ("int8", False),
    ],
)
def test_values_of_lines_that_do_not_fit_are_failures(tmp_path, kind, value):
    write_lines(tmp_path / "c.jsonl", {"text": "a", "x": value})
    (record,) = open_source([tmp_path / "c.jsonl"], Columns(keep={"x": kind}))
    assert (record.kind, record.source.passthrough) == ("bad_value", None)
    assert record.message.startswith("c.jsonl line 1: 'x' does not fit int")


@pytest.mark.parametrize("number", [pa.int64(), pa.float32()])
def test_a_boolean_of_a_line_is_no_number(tmp_path, number):
    kinds = {"x": number, "s": pa.struct([("a", number)]), "l": pa.list_(number)}
    table = pa.table({"text": ["a"], **{name: pa.nulls(1, kind) for name, kind in kinds.items()}})
    pq.write_table(table, tmp_path / "a.parquet")
    lines = [{"x": True}, {"s": {"a": True}}, {"l": [False]}, {"x": 1, "s": {"a": 0}, "l": [1]}]
    write_lines(tmp_path / "b.jsonl", *({"text": "a", **line} for line in lines))
    _, *bad, good = open_source([tmp_path], Columns(keep=dict.fromkeys(kinds)))
    for name, record in zip(kinds, bad, strict=True):
        assert (record.kind, record.source.passthrough) == ("bad_value", None)
        assert f" {name!r} does not fit " in record.message
        assert record.message.endswith(": a boolean is no number; keep it as another type, or not at all")
    assert good.source.passthrough.to_pylist() == [lines[-1]]


def test_a_column_of_booleans_becomes_numbers_where_these_are_asked_for(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"], "x": [True, False]}), tmp_path / "t.parquet")
    source = open_source([tmp_path / "t.parquet"], Columns(keep={"x": "int"}))
    assert copied(source).to_pylist() == [{"x": 1}, {"x": 0}]


def test_half_a_surrogate_pair_does_not_fit_a_string(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a", "x": "\\ud800"}')
    (record,) = open_source([tmp_path / "c.jsonl"], Columns(keep={"x": "string"}))
    assert record.kind == "bad_value"


def test_keep_columns_are_parsed():
    assert parse_keep_columns("a:int, b:string ,c") == {"a": "int", "b": "string", "c": None}
    assert parse_keep_columns("t:timestamp[us],a b:float32") == {"t": "timestamp[us]", "a b": "float32"}
    assert parse_keep_columns(" ") == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a,,b", "kept columns 'a,,b' cannot be parsed at ''; write name or name:type, comma-separated"),
        ("a:", "kept columns 'a:' cannot be parsed at 'a:'; write name or name:type, comma-separated"),
        (":int", "kept columns ':int' cannot be parsed at ':int'; write name or name:type, comma-separated"),
        ("a,a:int", "kept column 'a' is named twice"),
        (
            "a:number",
            "'number' is not a column type; types are, for example, "
            "string, int, float, bool, int32, float32, date32, timestamp[us], binary",
        ),
    ],
)
def test_keep_columns_that_cannot_be_parsed(spec, message):
    with pytest.raises(ConfigError) as caught:
        parse_keep_columns(spec)
    assert str(caught.value) == message


def test_a_wrong_type_is_refused_without_the_parser():
    with pytest.raises(ConfigError, match="'number' is not a column type"):
        Columns(keep={"a": "number"})
