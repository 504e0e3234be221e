"""Columns that are copied to the output: which, under which names and types, and what does not fit."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns, parse_keep_columns
from pipeline.inputs.source import open_source
from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.published import Published
from pipeline.outputs.writing import output_writer
from pipeline.records import Answer


def write_arrow(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def copied(source):
    """The pass-through rows as one table."""
    return pa.Table.from_batches([record.source.passthrough for record in source], schema=source.schema)


def refusal(inputs, columns):
    with pytest.raises(InputError) as caught:
        open_source(inputs, columns)
    return str(caught.value)


RICH = pa.table(
    {
        "text": ["a", "b", "c"],
        "nested": pa.array([{"x": [1, None], "y": {"z": "q"}}, None, {"x": [], "y": None}]),
        "category": pa.array(["k", None, "k"]).dictionary_encode(),
        "when": pa.array([1, 2, None], pa.timestamp("ns", tz="Europe/Berlin")),
        "price": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("-3.25")]),
        "day": pa.array([datetime.date(2020, 1, 2), None, None]),
        "blob": pa.array([b"\xff\x00", b"", None]),
        "half": pa.array([1.5, None, 2.0], pa.float16()),
        "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int32())),
        "small": pa.array([1, 2, 3], pa.uint8()),
    }
)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_all_other_columns_pass_with_their_types(tmp_path, name):
    (pq.write_table if name == "t.parquet" else lambda table, path: write_arrow(path, table))(
        RICH, tmp_path / name
    )
    source = open_source([tmp_path / name], Columns())
    expected = RICH.drop_columns(["text"])
    assert source.schema == expected.schema
    assert copied(source).combine_chunks().equals(expected)


def test_types_that_parquet_does_not_have_pass_from_arrow(tmp_path):
    table = pa.table(
        {
            "text": ["a", "b"],
            "view": pa.array(["x", None], pa.string_view()),
            "runs": pa.RunEndEncodedArray.from_arrays([2], pa.array(["r"])),
            "span": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
            "id_": pa.array([b"0" * 16, None], pa.uuid()),
        }
    )
    write_arrow(tmp_path / "t.arrow", table)
    source = open_source([tmp_path / "t.arrow"], Columns())
    assert copied(source).combine_chunks().to_pylist() == table.drop_columns(["text"]).to_pylist()
    runs_decoded = table.drop_columns(["text"]).schema.set(1, pa.field("runs", pa.string()))
    assert source.schema == runs_decoded


def test_question_and_id_columns_do_not_pass(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "q": ["q"], "key": ["k"], "n": [1]}), tmp_path / "t.parquet")
    assert open_source([tmp_path / "t.parquet"], Columns(question="q", id="key")).schema.names == ["n"]


def test_field_numbers_of_parquet_do_not_pass(tmp_path):
    field = pa.field("n", pa.int64(), metadata={"PARQUET:field_id": "1", "unit": "m"})
    schema = pa.schema([pa.field("text", pa.string(), metadata={"PARQUET:field_id": "2"}), field])
    pq.write_table(pa.table([["a"], [1]], schema=schema), tmp_path / "t.parquet")
    source = open_source([tmp_path / "t.parquet"], Columns())
    assert source.schema.field("n").metadata == {b"unit": b"m"}


def test_a_required_column_becomes_nullable(tmp_path):
    schema = pa.schema([pa.field("text", pa.string()), pa.field("n", pa.int64(), nullable=False)])
    pq.write_table(pa.table([["a"], [1]], schema=schema), tmp_path / "t.parquet")
    assert open_source([tmp_path / "t.parquet"], Columns()).schema.field("n").nullable


def test_files_are_unified(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "x": pa.nulls(1), "y": ["y"]}), tmp_path / "a.parquet")
    write_arrow(tmp_path / "b.arrow", pa.table({"z": [1.5], "text": ["b"], "x": [1]}))
    source = open_source([tmp_path], Columns())
    assert source.schema == pa.schema([("x", pa.int64()), ("y", pa.string()), ("z", pa.float64())])
    assert copied(source).to_pylist() == [{"x": None, "y": "y", "z": None}, {"x": 1, "y": None, "z": 1.5}]


def test_conflicting_types_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "year": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "year": ["1"]}), tmp_path / "b.parquet")
    assert refusal([tmp_path], Columns()) == (
        "column 'year' is int64 in a.parquet but string in b.parquet; "
        "keep it as one type for both, as in --keep-columns year:string"
    )
    both = open_source([tmp_path], Columns(keep=parse_keep_columns("year:string")))
    assert copied(both).to_pylist() == [{"year": "1"}, {"year": "1"}]


def test_dictionaries_that_differ_in_index_size_are_unified(tmp_path):
    for name, size in (("a.parquet", pa.int8()), ("b.parquet", pa.int16())):
        column = pa.DictionaryArray.from_arrays(pa.array([0], size), pa.array([name]))
        pq.write_table(pa.table({"text": ["a"], "k": column}), tmp_path / name)
    source = open_source([tmp_path], Columns())
    assert source.schema.field("k").type == pa.dictionary(pa.int32(), pa.string())
    assert copied(source).to_pylist() == [{"k": "a.parquet"}, {"k": "b.parquet"}]


def test_names_of_the_output_are_avoided_and_noted(tmp_path):
    table = pa.table({"text": ["a"], "id": [1], "answer": ["x"], "answer_input": ["y"], "row": [2]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source([tmp_path / "t.parquet"], Columns())
    assert source.schema.names == ["id_input", "answer_input_input", "answer_input", "row_input"]
    assert source.notes == [
        "input column 'id' is written as 'id_input', as there is another 'id'",
        "input column 'answer' is written as 'answer_input_input', as there is another 'answer'",
        "input column 'row' is written as 'row_input', as there is another 'row'",
    ]
    expected = {"id_input": 1, "answer_input_input": "x", "answer_input": "y", "row_input": 2}
    assert copied(source).to_pylist() == [expected]


def test_other_keys_of_lines_pass_as_json(tmp_path):
    write_lines(
        tmp_path / "c.jsonl",
        {"text": "a", "key": "k", "q": "?", "year": 2020, "tags": ["ä", None], "x": {"y": 1.5}},
        {"text": "b", "key": "l", "q": "?"},
    )
    source = open_source([tmp_path / "c.jsonl"], Columns(question="q", id="key"))
    assert source.schema == pa.schema([("extra", pa.large_string())])
    first, second = copied(source).column("extra").to_pylist()
    assert first == '{"year": 2020, "tags": ["ä", null], "x": {"y": 1.5}}'
    assert second is None


def test_extra_is_always_valid_json(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"text": "a", "n": NaN, "m": [-Infinity]}\n'
        '{"text": "a", "s": "\\ud800"}\n'
        '{"text": "a", "n": 1e999}\n'
    )
    nan, surrogate, huge = open_source([tmp_path / "c.jsonl"], Columns())
    assert nan.source.passthrough.to_pylist() == [{"extra": '{"n": null, "m": [null]}'}]
    assert surrogate.source.passthrough.to_pylist() == [{"extra": '{"s": "\\ud800"}'}]
    assert huge.source.passthrough.to_pylist() == [{"extra": '{"n": 1e999}'}]


NUMBERS = (
    '{"v": 0.12345678901234567890123, "n": [1.10, 1.0, 1, -0], "e": {"x": 1E5}, "big": 123456789012345678901}'
)


def test_numbers_of_lines_stay_as_they_were_written(tmp_path):
    (tmp_path / "c.jsonl").write_text(f'{{"text": "a", {NUMBERS[1:]}\n')
    (record,) = open_source([tmp_path / "c.jsonl"], Columns())
    assert record.source.passthrough.to_pylist() == [{"extra": NUMBERS}]
    kept = Columns(keep=parse_keep_columns("v,n,e:string,big,n2:float,none"))
    (record,) = open_source([tmp_path / "c.jsonl"], kept)
    assert record.source.passthrough.to_pylist() == [
        {
            "v": "0.12345678901234567890123",
            "n": "[1.10, 1.0, 1, -0]",
            "e": '{"x": 1E5}',
            "big": "123456789012345678901",
            "n2": None,
            "none": None,
        }
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 5}, [{"a": 5}]),
        ({}, [{"a": None}]),
        (None, None),
        ([{"a": 5}, {"b": 1}], "it has no field 'b'"),
        ({"a": 5.5}, "Float value 5.500000 was truncated converting to int64"),
    ],
)
def test_objects_of_lines_become_structs_of_tables_without_loss(tmp_path, value, expected):
    kind = pa.list_(pa.struct([pa.field("a", pa.int64(), nullable=False)]))
    pq.write_table(pa.table({"text": ["a"], "m": pa.array([[{"a": 1}]], kind)}), tmp_path / "a.parquet")
    write_lines(tmp_path / "b.jsonl", {"text": "b", "m": [value] if isinstance(value, dict) else value})
    _, record = open_source([tmp_path], Columns(keep=parse_keep_columns("m")))
    if isinstance(expected, str):
        assert f"'m' does not fit list<element: struct<a: int64>>: {expected}" in record.message
    else:
        assert record.source.passthrough.to_pylist() == [{"m": expected}]


def test_texts_that_are_all_null_are_rows_that_fail(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "q": ["q"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(1), "q": pa.nulls(1)}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.nulls(0), "q": pa.nulls(0)}), tmp_path / "c.parquet")
    good, bad = open_source([tmp_path], Columns(question="q"))
    assert (good.text, bad.kind) == ("a", "missing_text")


def test_tables_and_lines_together(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "extra": [1]}), tmp_path / "a.parquet")
    write_lines(tmp_path / "b.jsonl", {"text": "b", "extra": 2})
    source = open_source([tmp_path], Columns())
    assert source.schema == pa.schema([("extra", pa.int64()), ("extra_input", pa.large_string())])
    assert copied(source).to_pylist() == [
        {"extra": 1, "extra_input": None},
        {"extra": None, "extra_input": '{"extra": 2}'},
    ]


def test_keys_of_json_lines_remain_keys_in_json_lines_and_come_back(tmp_path):
    lines = [
        {"text": "a", "v": "V", "status": "mine", "status_input": 1, "o": {"b": None, "a": []}},
        {"text": "b"},
        {"text": "c", "extra": "é\ud800", "o": {}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines).replace('"V"', "1.10")
    (tmp_path / "in.jsonl").write_text(text)
    source = open_source([tmp_path / "in.jsonl"], Columns(), str(tmp_path / "out.jsonl"))
    schema = output_schema(source.schema, {})
    answers = [Answer.begin(record.source, "dense") for record in source]
    with output_writer(tmp_path / "out.jsonl", schema) as writer:
        writer.write_table(answers_table(answers, schema))
    written = (tmp_path / "out.jsonl").read_text()
    assert '"v": 1.10, "status_input_input": "mine", "status_input": 1, "o": {"b": null, "a": []}}' in written
    rows = [json.loads(line) for line in written.splitlines()]
    assert [list(row)[len(schema.names) - 1 :] for row in rows] == [
        ["v", "status_input_input", "status_input", "o"],
        [],
        ["extra", "o"],
    ]
    assert rows[2]["extra"] == "é\ud800"
    assert [rows[0]["status"], rows[0]["id"]] == ["ok", "in.jsonl:0"]
    published = Published(tmp_path / "out.jsonl", lines_schema=schema)
    (group,) = published
    expected = answers_table(answers, schema).column("extra")
    assert published.read(group).column("extra").to_pylist() == expected.to_pylist()
    with output_writer(tmp_path / "again.jsonl", schema) as writer:
        writer.write_table(published.read(group))
    assert (tmp_path / "again.jsonl").read_text() == written
