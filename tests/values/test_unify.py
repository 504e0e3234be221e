"""One type for a column that has several, and values that become it."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns, parse_keep_columns
from pipeline.inputs.source import open_source
from pipeline.values.dictionaries import settled
from pipeline.values.unify import common

A, B = pa.field("a", pa.int64()), pa.field("b", pa.string())
REQUIRED = pa.field("a", pa.int64(), nullable=False)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (pa.null(), pa.struct([A]), pa.struct([A])),
        (pa.list_(pa.string()), pa.list_(pa.null()), pa.list_(pa.string())),
        (pa.struct([A]), pa.struct([("a", pa.null())]), pa.struct([A])),
        (
            pa.struct([A, B]),
            pa.struct([B, REQUIRED, ("c", pa.bool_())]),
            pa.struct([A, B, ("c", pa.bool_())]),
        ),
        (pa.list_(REQUIRED), pa.list_(A), pa.list_(pa.field("item", pa.int64()))),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string_view(), pa.string(), pa.large_string()),
        (pa.binary(3), pa.binary(4), pa.large_binary()),
        (pa.list_(pa.int8()), pa.large_list(pa.int16()), pa.large_list(pa.int16())),
        (pa.list_(pa.int8(), 2), pa.list_view(pa.int8()), pa.large_list(pa.int8())),
        (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.int64()), pa.map_(pa.string(), pa.int64())),
        (pa.dictionary(pa.int8(), pa.string()), pa.large_string(), pa.large_string()),
        (
            pa.dictionary(pa.uint32(), pa.string_view()),
            pa.dictionary(pa.int8(), pa.large_string(), ordered=True),
            pa.dictionary(pa.int64(), pa.large_string()),
        ),
        (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("ms", "Europe/Berlin"), pa.timestamp("ms", "UTC"), pa.timestamp("ms", "UTC")),
        (pa.time32("s"), pa.time64("ns"), pa.time64("ns")),
        (pa.duration("s"), pa.duration("ms"), pa.duration("ms")),
        (pa.date32(), pa.date64(), pa.date64()),
        (pa.int8(), pa.int32(), pa.int32()),
        (pa.uint32(), pa.int8(), pa.int64()),
        (pa.int32(), pa.float16(), pa.float64()),
        (pa.int16(), pa.float32(), pa.float32()),
        (pa.decimal128(5, 2), pa.decimal128(10, 0), pa.decimal128(12, 2)),
        (pa.decimal128(38, 0), pa.decimal128(38, 10), pa.decimal256(48, 10)),
        (pa.int64(), pa.decimal128(5, 2), pa.decimal128(22, 2)),
        (pa.run_end_encoded(pa.int32(), pa.string()), pa.string(), pa.string()),
        (pa.uuid(), pa.binary(16), pa.binary(16)),
    ],
    ids=str,
)
def test_types_that_have_a_common_one(one, other, expected):
    for first, second in ((one, other), (other, one)):
        joined = common(settled(first), settled(second))
        if not pa.types.is_struct(joined):  # whose fields are in the order of the first
            assert joined == expected
        assert converted_nulls(first, joined) == converted_nulls(second, joined) == [None]
    assert common(settled(one), settled(other)) == expected


def converted_nulls(kind, joined):
    from pipeline.values.converting import converted

    return (
        converted(pa.nulls(1, kind), joined).to_pylist() if not pa.types.is_run_end_encoded(kind) else [None]
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.int64(), pa.float64()),  # has not all digits of 2**53 + 1
        (pa.uint64(), pa.int8()),
        (pa.int64(), pa.string()),
        (pa.bool_(), pa.int8()),
        (pa.timestamp("s"), pa.timestamp("s", "UTC")),
        (pa.timestamp("s"), pa.date32()),
        (pa.decimal256(76, 0), pa.decimal256(76, 10)),
        (pa.struct([("a", pa.int64())]), pa.struct([("a", pa.string())])),
        (pa.struct([A, A]), pa.struct([A])),
        (pa.string(), pa.binary()),
    ],
    ids=str,
)
def test_types_that_have_none(one, other):
    assert common(one, other) is common(other, one) is None


def write_both(folder, one, other):
    for name, column in (("a.parquet", one), ("b.parquet", other)):
        pq.write_table(pa.table({"text": ["t"], "m": column}), folder / name)
    return [folder]


def copied(source):
    return pa.Table.from_batches([record.source.passthrough for record in source], schema=source.schema)


def test_structs_are_joined_by_names(tmp_path):
    one = pa.array([{"a": 1, "b": "x"}], pa.struct([REQUIRED, B]))
    other = pa.array([{"b": "y", "c": True}], pa.struct([B, ("c", pa.bool_())]))
    source = open_source(write_both(tmp_path, one, other), Columns())
    assert copied(source).column("m").to_pylist() == [
        {"a": 1, "b": "x", "c": None},
        {"a": None, "b": "y", "c": True},
    ]


@pytest.mark.parametrize(
    ("one", "other", "remedy", "expected"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5]), "m:string", ["9007199254740993", "0.5"]),
        (pa.array(["é"]), pa.array([b"\xff"]), "m:binary", ["é".encode(), b"\xff"]),
        (pa.array([[1, None]]), pa.array([{"a": [1.5]}]), "m:string", ["[1, null]", '{"a": [1.5]}']),
    ],
)
def test_the_remedy_for_what_has_no_common_type_works(tmp_path, one, other, remedy, expected):
    inputs = write_both(tmp_path, one, other)
    with pytest.raises(InputError) as caught:
        open_source(inputs, Columns())
    assert str(caught.value) == (
        f"column 'm' is {pq.read_schema(tmp_path / 'a.parquet').field('m').type} in a.parquet "
        f"but {pq.read_schema(tmp_path / 'b.parquet').field('m').type} in b.parquet; "
        f"keep it as one type for both, as in --keep-columns {remedy}"
    )
    source = open_source(inputs, Columns(keep=parse_keep_columns(remedy)))
    assert copied(source).column("m").to_pylist() == expected


def test_a_time_that_the_finer_unit_has_no_room_for_costs_its_row(tmp_path):
    far = pa.array([253402300799], pa.timestamp("s"))  # the year 9999, as Parquet has it in milliseconds
    good, bad = open_source(write_both(tmp_path, pa.array([1], pa.timestamp("ns")), far), Columns())
    assert good.source.passthrough.schema.field("m").type == pa.timestamp("ns")
    assert bad.kind == "bad_value"
    assert "'m' does not fit timestamp[ns]" in bad.message
