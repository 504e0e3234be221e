"""Columns that the output's format cannot hold are refused before any row is answered."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.columns import Columns, parse_keep_columns
from pipeline.inputs.source import open_source
from pipeline.outputs.answers import answers_table, output_schema
from pipeline.outputs.formats import SINKS
from pipeline.outputs.writing import output_writer
from pipeline.records import Answer

DICTIONARY = pa.DictionaryArray.from_arrays(
    pa.array([0], pa.int8()), pa.array([{"a": 1}], pa.struct([pa.field("a", pa.int64(), nullable=False)]))
)
CATEGORICAL = pa.DictionaryArray.from_arrays(pa.array([0], pa.uint32()), pa.array(["x"], pa.string_view()))
INTERVAL = pa.array([(1, 2, 3)], pa.month_day_nano_interval())


def write_stream(path, **columns):
    table = pa.table({"text": ["t"], **columns})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [path]


def write_output(source, path):
    schema = output_schema(source.schema, {})
    answers = [Answer(id="a", row=0, passthrough=record.source.passthrough) for record in source]
    with output_writer(path, schema) as writer:
        writer.write_table(answers_table([*answers, Answer(id="b", row=1)], schema))


@pytest.mark.parametrize(
    ("column", "extension", "others"),
    [
        (DICTIONARY, ".parquet", ".arrows"),
        (DICTIONARY, ".arrow", ".arrows"),
        (INTERVAL, ".parquet", ".arrows"),
    ],
    ids=["dictionary", "dictionary-file", "interval"],
)
def test_a_column_is_refused_with_remedies_that_work(tmp_path, column, extension, others):
    inputs = write_stream(tmp_path / "in.arrows", n=pa.array([1]), m=column)
    with pytest.raises(ConfigError) as caught:
        open_source(inputs, Columns(), str(tmp_path / f"out{extension}"))
    message = str(caught.value)
    assert message.startswith(
        f"column 'm' is {open_source(inputs, Columns()).schema.field('m').type}, which {extension} "
    )
    assert message.endswith(
        f"; name an output with {others}, or keep it as text, as in --keep-columns m:string,n, "
        "or leave it out, as in --keep-columns n"
    )
    for keep, name in ((None, f"out{others}"), ("m:string,n", f"text{extension}"), ("n", f"less{extension}")):
        kept = Columns(keep=keep and parse_keep_columns(keep))
        write_output(open_source(inputs, kept, str(tmp_path / name)), tmp_path / name)


def test_structs_whose_fields_share_a_name_are_no_json(tmp_path):
    twins = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    inputs = write_stream(tmp_path / "in.arrows", m=pa.ListArray.from_arrays([0, 1], twins), n=pa.array([1]))
    with pytest.raises(ConfigError) as caught:
        open_source(inputs, Columns(), "out.jsonl")
    assert str(caught.value) == (
        "column 'm' is list<item: struct<a: int64, a: int64>>, which .jsonl cannot hold (Two fields of a "
        "struct have one name, of which JSON keeps one); name an output with .arrows, or leave it out, as in "
        "--keep-columns n"
    )
    with pytest.raises(InputError, match="cannot become large_string"):
        open_source(inputs, Columns(keep=parse_keep_columns("m:string")))


@pytest.mark.parametrize("extension", SINKS)
def test_what_every_format_holds_is_written(tmp_path, extension):
    required = pa.array([{"a": 1}], pa.struct([pa.field("a", pa.int64(), nullable=False)]))
    path = tmp_path / f"out{extension}"
    columns = {"kind": CATEGORICAL, "m": required, "view": pa.array([[1]], pa.list_view(pa.int8()))}
    source = open_source(write_stream(tmp_path / "in.arrows", **columns), Columns(), str(path))
    write_output(source, path)
    if extension == ".parquet":
        first, second = pq.read_table(path, columns=list(columns)).to_pylist()
        assert first == {"kind": "x", "m": {"a": 1}, "view": [1]}
        assert second == {"kind": None, "m": None, "view": None}


def test_what_polars_tells_of_a_categorical_does_not_pass(tmp_path):
    schema = pa.schema(
        [("text", pa.string()), pa.field("kind", CATEGORICAL.type, metadata={"_PL_CATEGORICAL2": "0"})]
    )
    table = pa.table([["t"], CATEGORICAL], schema=schema)
    with pa.OSFile(str(tmp_path / "in.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    field = open_source([tmp_path / "in.arrow"], Columns()).schema.field("kind")
    assert (field.type, field.metadata) == (pa.dictionary(pa.uint32(), pa.string()), None)
