"""Layouts that are taken apart when they are read, and texts of what nests."""

import uuid

import pyarrow as pa
import pytest

from pipeline.values.converting import converted
from pipeline.values.dictionaries import settled

REQUIRED = pa.field("a", pa.int64(), nullable=False)
LAYOUTS = [
    pa.RunEndEncodedArray.from_arrays([1, 3], pa.array(["r", None], pa.string_view())),
    pa.array([[1, 2], None, [3]], pa.list_view(pa.int64())),
    pa.array([[["a"]], None, [[]]], pa.large_list_view(pa.list_view(pa.string()))),
    pa.array([{"a": [1, None]}, None, {"a": None}], pa.struct([("a", pa.list_view(pa.int64()))])),
    pa.array([[{"a": 1}], None, []], pa.list_(pa.struct([REQUIRED]))),
    pa.DictionaryArray.from_arrays(
        pa.array([0, None, 1], pa.uint32()), pa.array(["x", "y"], pa.string_view())
    ),
    pa.DictionaryArray.from_arrays(
        pa.array([0, None, 0], pa.int8()), pa.array([{"a": 1}], pa.struct([REQUIRED]))
    ),
]


@pytest.mark.parametrize("array", LAYOUTS, ids=lambda array: str(array.type))
def test_what_is_taken_apart_holds_the_same(array):
    for part in (array, array.slice(1), array.slice(1, 1), array.slice(0, 0)):
        whole = converted(part, settled(array.type))
        whole.validate(full=True)
        assert whole.type == settled(array.type) != array.type
        assert whole.to_pylist() == part.to_pylist()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([{"a": [1.5, None], "b": b"\xff"}]), '{"a": [1.5, null], "b": "/w=="}'),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())), '[["k", 1]]'),
        (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), "[1, 2, 3]"),
        (pa.array([bytes(16)], pa.uuid()), str(uuid.UUID(int=0))),
        (pa.array(["x"]).dictionary_encode(), "x"),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_values_without_a_text_become_json(array, expected):
    assert converted(array, pa.large_string()).to_pylist() == [expected]


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32()], ids=str)
def test_of_numbers_only_0_and_1_are_booleans(kind):
    assert converted(pa.array([0, 1, None], kind), pa.bool_()).to_pylist() == [False, True, None]
    with pytest.raises(pa.ArrowInvalid, match="only 0 and 1"):
        converted(pa.array([1, 5], kind), pa.bool_())


def test_views_become_other_types():
    assert converted(pa.array(["2020-01-02"], pa.string_view()), pa.date32()).cast(
        pa.int32()
    ).to_pylist() == [18263]
