"""Inputs of runs, made at random: damaged tables, tables of odd types, JSON lines, and bytes of any kind."""

from __future__ import annotations

import base64
import datetime
import decimal
import gzip
import io
import json
import uuid
import zlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st

OUTPUTS = (".parquet", ".arrow", ".arrows", ".jsonl")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Case:
    """An input file, the flags of its run, and how many rows it is known to have."""

    name: str
    packed: str
    flags: tuple[str, ...] = ()
    rows: int | None = None
    output: str = ".parquet"

    @property
    def data(self):
        return zlib.decompress(base64.b85decode(self.packed))


def case(name, data, flags, rows, output):
    return Case(name, base64.b85encode(zlib.compress(data)).decode(), tuple(flags), rows, output)


def flags(keep=(None,)):
    def chosen(question, id, overlong, kept):
        words = [*question, *id, "--on-overlong", overlong]
        return [*words, "--keep-columns", kept] if kept is not None else words

    return st.builds(
        chosen,
        question=st.sampled_from([("--question", "what?"), ("--question-column", "question")]),
        id=st.sampled_from([(), ("--id-column", "id")]),
        overlong=st.sampled_from(["error", "skip", "truncate-middle"]),
        kept=st.sampled_from(keep),
    )


outputs = st.sampled_from(OUTPUTS)


def plain_table():
    count = 40
    return pa.table(
        {
            "text": [f"text {i} " * (i % 7) for i in range(count)],
            "question": [f"question {i}" if i % 9 else None for i in range(count)],
            "id": [f"id-{i}" for i in range(count)],
            "nested": [{"a": [i, None], "b": f"{i}"} for i in range(count)],
            "k": pa.array(["x", "y", None, "y"] * (count // 4)).dictionary_encode(),
            "time": pa.array(range(count), pa.timestamp("ns", "Europe/Berlin")),
            "price": pa.array([decimal.Decimal(i) / 100 for i in range(count)], pa.decimal128(9, 2)),
        }
    )


def parquet(table, **options):
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def arrow(table, opened, **options):
    sink = io.BytesIO()
    with opened(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=15):
            writer.write_batch(batch)
    return sink.getvalue()


def whole_tables():
    table = plain_table()
    return [
        ("in.parquet", parquet(table, row_group_size=15)),
        ("in.parquet", parquet(table, compression="zstd", write_page_checksum=True)),
        ("in.parquet", parquet(table, compression="none", use_dictionary=False, data_page_version="2.0")),
        ("in.parquet", parquet(table, compression="gzip", data_page_size=200, version="2.6")),
        ("in.arrow", arrow(table, pa.ipc.new_file)),
        ("in.feather", arrow(table, pa.ipc.new_file, compression="zstd")),
        ("in.arrows", arrow(table, pa.ipc.new_stream)),
        ("in.arrows", arrow(table, pa.ipc.new_stream, compression="lz4")),
    ]


@st.composite
def damaged(draw, data):
    """Some bytes changed, perhaps the end cut off."""
    last = len(data) - 1
    places = st.integers(0, last)
    found = bytearray(data)
    for place, mask in draw(st.lists(st.tuples(places, st.integers(1, 255)), max_size=8)):
        found[place] ^= mask
    cut = draw(st.just(len(found)) | st.just(len(found)) | st.integers(0, last))
    return bytes(found[:cut])


@st.composite
def damaged_tables(draw):
    name, data = draw(st.sampled_from(WHOLE_TABLES))
    chosen = draw(flags([None, "", "k:string", "time:string,price:float"]))
    return case(name, draw(damaged(data)), chosen, None, draw(outputs))


WHOLE_TABLES = whole_tables()


NOON = datetime.datetime(2024, 2, 29, 12, 0, 0, 123456)
ODD_VALUES = {
    "int8": pa.array([1, None, -128], pa.int8()),
    "uint64": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "float16": pa.array([1.5, None, float("inf")], pa.float16()),
    "float": pa.array([float("nan"), None, float("-inf")]),
    "bool": pa.array([True, None, False]),
    "null": pa.nulls(3),
    "text": pa.array(["one fish", "", None]),
    "view": pa.array(
        ["red fish", None, "blue fish, and a text too long to be held inline"], pa.string_view()
    ),
    "large": pa.array(["\x00", "  ", "<|im_end|>\n<|im_start|>"], pa.large_string()),
    "binary": pa.array([b"\xff\xfe", None, b""]),
    "binary view": pa.array([b"\xff\xfe", None, b"a value too long to be held inline"], pa.binary_view()),
    "fixed": pa.array([b"ab", None, b"\xff\x00"], pa.binary(2)),
    "date32": pa.array([0, None, 2**31 - 1], pa.int32()).cast(pa.date32()),
    "date64": pa.array([0, None, 86_400_000 * 10**9], pa.int64()).cast(pa.date64()),
    "time32": pa.array([0, None, 86_399], pa.int32()).cast(pa.time32("s")),
    "time64": pa.array([1, None, 86_399_999_999_999], pa.int64()).cast(pa.time64("ns")),
    "time out of range": pa.array([-1, None, 2**62], pa.int64()).cast(pa.time64("ns")),
    "naive": pa.array([NOON, None, NOON], pa.timestamp("us")),
    "zoned": pa.array([NOON, None, NOON], pa.timestamp("s", "Europe/Berlin"), safe=False),
    "offset": pa.array([0, None, 2**62], pa.timestamp("ns", "+05:45")),
    "unknown zone": pa.array([0, None, 1], pa.timestamp("ms", "Mars/Olympus")),
    "far": pa.array([2**63 - 1, None, -(2**63)], pa.int64()).cast(pa.timestamp("s")),
    "far inside": pa.array([[2**63 - 1], None, [0]], pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("s"))),
    "duration": pa.array([0, None, 2**63 - 1], pa.duration("ns")),
    "interval": pa.array([(1, 2, 3), None, (-1, 0, 2**40)], pa.month_day_nano_interval()),
    "decimal": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-9.99")], pa.decimal128(38, 2)),
    "decimal256": pa.array([decimal.Decimal(10) ** 60, None, decimal.Decimal(0)], pa.decimal256(76, 3)),
    "small decimal": pa.array([decimal.Decimal("1E-12"), None, None], pa.decimal128(3, 12)),
    "round decimal": pa.array([decimal.Decimal(900), None, None], pa.decimal128(3, -2)),
    "list": pa.array([[1, None], None, []]),
    "large list": pa.array([["a"], None, []], pa.large_list(pa.string())),
    "list view": pa.array([[1, 2], None, []], pa.list_view(pa.int64())),
    "fixed list": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int16(), 2)),
    "struct": pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
    "no fields": pa.array([{}, None, {}], pa.struct([])),
    "twin fields": pa.StructArray.from_arrays([pa.array([1, 2, 3]), pa.array(["a", None, "b"])], ["a", "a"]),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "dictionary": pa.array(["x", None, "y"]).dictionary_encode(),
    "tiny dictionary": pa.array(["x", None, "x"], pa.dictionary(pa.int8(), pa.large_string(), ordered=True)),
    "number dictionary": pa.array([7, None, 7]).dictionary_encode(),
    "nested dictionary": pa.array([["x"], None, ["y", "x"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "runs": pa.RunEndEncodedArray.from_arrays([2, 3], ["a", None]),
    "sparse union": pa.UnionArray.from_sparse(
        pa.array([0, 1, 0], pa.int8()), [pa.array([1, 2, 3]), pa.array(["a", "b", None])]
    ),
    "dense union": pa.UnionArray.from_dense(
        pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array([1, 2]), pa.array(["a"])]
    ),
    "uuid": pa.ExtensionArray.from_storage(
        pa.uuid(), pa.array([uuid.UUID(int=1).bytes, None, uuid.UUID(int=2).bytes], pa.binary(16))
    ),
    "json": pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(["{}", None, "["])),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [2]), pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2))
    ),
    "opaque": pa.ExtensionArray.from_storage(
        pa.opaque(pa.binary(), "thing", "vendor"), pa.array([b"a", None, b"\xff"])
    ),
}
ODD_NAMES = ("extra", "answer", "row", "status", "text_input", "", "a.b", "two\nlines", "ключ", "x" * 300)

odd_values = st.sampled_from(sorted(ODD_VALUES))
text_values = st.sampled_from(["text", "large", "view", "dictionary", "tiny dictionary"])
TABLE_FORMATS = {
    "in.parquet": parquet,
    "in.arrow": lambda table: arrow(table, pa.ipc.new_file),
    "in.arrows": lambda table: arrow(table, pa.ipc.new_stream),
}


@st.composite
def odd_tables(draw):
    chosen = draw(st.dictionaries(st.sampled_from(ODD_NAMES), odd_values, max_size=4))
    chosen["text"] = draw(text_values | text_values | odd_values)
    chosen["question"] = draw(text_values)
    chosen["id"] = draw(odd_values)
    names, values = list(chosen), list(chosen.values())
    if draw(st.integers(0, 19)) == 19:
        names.append(names[0])
        values.append(draw(odd_values))
    picks = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
    table = pa.Table.from_arrays([picked(ODD_VALUES[value], picks) for value in values], names)
    name = draw(st.sampled_from(sorted(TABLE_FORMATS)))
    try:
        data = TABLE_FORMATS[name](table)
    except (OSError, pa.ArrowException):  # a type that the format lacks
        name, data = "in.arrows", TABLE_FORMATS["in.arrows"](table)
    kept = (
        ["extra", "extra:string", "extra:int,answer:string"]
        if {"extra", "answer"} <= {*names}
        else ["", None]
    )
    return case(name, data, draw(flags([None, *kept])), len(picks), draw(outputs))


def picked(values, picks):
    return pa.concat_arrays([values.slice(i, 1) for i in picks])


any_text = st.text(st.characters(), max_size=12)  # halves of surrogate pairs too
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)
objects = st.fixed_dictionaries(
    {"text": st.just("one fish two fish") | any_text | any_json},
    optional={
        "question": st.just("how many?") | any_json,
        "id": st.integers(0, 9) | any_json,
        "x": any_json,
        "answer": any_json,
        "": any_json,
    },
)
HARD_LINES = [
    b'{"text": ' + b"[" * 100_000,
    b'{"text": "a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"text": "a", "x": ' + b'{"x":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    b'{"text": "a", "x": ' + b"9" * 5_000 + b"}",
    b'{"text": "a", "x": -' + b"9" * 4_000 + b"}",
    b'{"text": "a", "id": ' + b"9" * 4_000 + b"}",
    b'{"text": "a", "x": 1e999, "y": NaN, "z": [-Infinity]}',
    b'{"text": "a", "text": 1}',
    b'{"text": "a", "x": 1, "x": 2, "id": "same"}',
    b'{"text": "a", "id": "same"}',
    b'{"text": "' + b"long " * 60_000 + b'"}',
    b'{"text": "a", "question": "' + b"long " * 60_000 + b'"}',
    b'{"text": "a\x00b"}',
    rb'{"text": "a\u0000b", "x": "\u0000"}',
    rb'{"text": "\ud800"}',
    rb'{"text": "a", "x": "\udfff", "id": "\ud83d"}',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a"}\r',
    b'{"text": "a"}\r{"text": "b"}',
    b'{"text": "a\xe2\x80\xa8b"}',
    '{"text": "naïve"}'.encode("latin-1"),
    '{"text": "a"}'.encode("utf-16"),
    b'{"text": "<|im_end|><|im_start|>"}',
    b'{"text": "MarsDocumentSentinel7c1e49"}',
    b"\x00" * 50,
    b"\x1f\x8b\x08\x00",
    b"\xff" * 9,
    b"null",
    b"[]",
    b'"',
    b" \t\r",
]


def line_of(row, ascii):
    return json.dumps(row, ensure_ascii=ascii).encode("utf-8", "surrogatepass")


one_line = (
    st.builds(line_of, objects, st.booleans())
    | st.sampled_from(HARD_LINES)
    | st.binary(max_size=40).map(lambda line: line.replace(b"\n", b""))
)
COMPRESSIONS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor().compress,
}


@st.composite
def json_lines(draw):
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))
    data = draw(st.sampled_from([b"", b"", BOM])) + end.join(draw(st.lists(one_line, max_size=12)))
    rows = sum(bool(line.removeprefix(BOM).strip()) for line in data.split(b"\n"))  # files may be joined ones
    compression = draw(st.sampled_from(["", "", ".gz", ".zst"]))
    packed = COMPRESSIONS[compression](data)
    if compression and draw(st.booleans()):
        packed, rows = draw(damaged(packed)), None
    kept = [None, None, "", "x", "x:int", "x:timestamp[ms],answer:binary"]
    return case(f"in.jsonl{compression}", packed, draw(flags(kept)), rows, draw(outputs))


any_files = st.builds(
    case,
    st.sampled_from(
        ["in.txt", "in.md", "in.parquet", "in.arrow", "in.arrows", "in.jsonl.gz", "in.jsonl.zst"]
    ),
    st.sampled_from([b"", BOM, b"PAR1", b"ARROW1\0\0", b"fish\0\r\n" * 9]) | st.binary(max_size=80),
    flags(),
    st.none(),
    outputs,
)
