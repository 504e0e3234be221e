"""Where references stand: in a column of their own, among keys of JSON lines, in what is not finished."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from report_outputs import answered, copied, schema_of, write

from pipeline.errors import ConfigError
from pipeline.inputs.passthrough import EXTRA
from pipeline.outputs.journal import Journal
from pipeline.report.output_reading import opened
from pipeline.report.references import REFERENCE, references_in
from pipeline.values.jsonvalues import KEYS


def read(path, *columns):
    with opened([str(path)]) as (run,):
        return [row for table in run.tables([*columns, REFERENCE]) for row in table.to_pylist()]


def references(path):
    return [row[REFERENCE] for row in read(path, "id")]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("four years", ["four years"]),
        (["4", "four"], ["4", "four"]),
        (4, ["4"]),
        (None, None),
        ([], None),
        (" ", None),
        (float("nan"), None),
        ('["4", "four"]', ["4", "four"]),
    ],
    ids=["text", "list", "number", "null", "empty", "blank", "nan", "json"],
)
def test_a_column_of_its_own(tmp_path, kind, value, found):
    batch = copied(**{REFERENCE: value}) if value else None
    rows = [answered(0, passthrough=copied(reference=value or "x")), answered(1, passthrough=batch)]
    path = write(tmp_path / f"out.{kind}", rows)
    assert references(path)[1] == found


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_a_key_of_json_lines(tmp_path, name):
    field = pa.field(EXTRA, pa.large_string(), metadata=KEYS if name.endswith("jsonl") else None)
    texts = [json.dumps(keys) for keys in ({"a": 1, REFERENCE: "x"}, {"a": 2}, {REFERENCE: {"no": "text"}})]
    batches = [pa.RecordBatch.from_pylist([{EXTRA: text}], schema=pa.schema([field])) for text in texts]
    rows = [answered(n, passthrough=batch) for n, batch in enumerate(batches)]
    path = write(tmp_path / name, rows)
    assert references(path) == [["x"], None, None]
    assert [row["answer"] for row in read(path, "answer")] == ["answer 0", "answer 1", "answer 2"]


def test_a_run_that_is_not_finished(tmp_path):
    path = tmp_path / "out.parquet"
    batch = copied(reference="x")
    with Journal(path, schema_of(columns=batch.schema), {}, resume=True) as journal:
        journal.append([answered(0, passthrough=batch)])
        assert read(path, "row", "status") == [{"row": 0, "status": "ok", REFERENCE: ["x"]}]


def test_an_output_without_references(tmp_path):
    assert references(write(tmp_path / "out.parquet", [answered(0)])) == [None]


def test_a_column_that_holds_something_else_is_told():
    table = pa.table({EXTRA: ['"reference"', '{"reference' + '": ']})
    assert references_in(table.slice(0, 1)).to_pylist() == [None]
    with pytest.raises(ConfigError, match="'extra' holds no JSON"):
        references_in(table)
