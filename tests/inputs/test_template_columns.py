"""Columns that a prompt template writes, from every format to the prompt, and runs that use them."""

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.setup.new_rows import row_hash

ROWS = [
    {"text": "first text", "party": "Acme", "a b": 7},
    {"text": "second text", "party": None, "a b": 8},
]


def write_lines(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


WRITE = {
    "in.jsonl": write_lines,
    "in.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "in.arrow": lambda path: pyarrow.feather.write_feather(pa.Table.from_pylist(ROWS), path),
    "in.csv": lambda path: pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), path),
}


@pytest.fixture(params=WRITE)
def path(request, tmp_path):
    WRITE[request.param](tmp_path / request.param)
    return tmp_path / request.param


def fields(path, *names):
    return [record.source.fields for record in open_source([path], Columns(fields=names))]


def test_values_are_texts_and_nulls_are_empty(path):
    assert fields(path, "party", "a b") == [{"party": "Acme", "a b": "7"}, {"party": "", "a b": "8"}]


def test_such_columns_are_copied_too(path):
    (first, *_) = open_source([path], Columns(fields=("party",)))
    copied = first.source.passthrough.to_pylist()[0]
    assert json.loads(copied.get("extra") or json.dumps(copied))["party"] == "Acme"


def test_a_column_that_is_not_there_is_refused_with_near_names(path):
    with pytest.raises(InputError) as caught:
        open_source([path], Columns(fields=("partie",)))
    assert str(caught.value) == (
        f"{path.name} has no column 'partie' (did you mean 'party'?); it has: text, party, a b "
        "(--prompt-template writes it)"
    )


def test_a_text_document_has_no_columns_but_those_of_its_folders(tmp_path):
    path = tmp_path / "in" / "party=Acme" / "a.txt"
    path.parent.mkdir(parents=True)
    path.write_text("text")
    assert fields(tmp_path / "in", "party") == [{"party": "Acme"}]
    with pytest.raises(InputError, match=r"has no column 'party'; it has: text"):
        fields(path, "party")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("5", "5"),
        ("1.5", "1.5"),
        ("true", "true"),
        ('["a", 1]', '["a", 1]'),
        ('{"k": "é"}', '{"k": "\\u00e9"}'),
    ],
)
def test_values_of_other_types(tmp_path, value, text):
    (tmp_path / "in.jsonl").write_text(f'{{"text": "t", "v": {value}}}\n')
    assert fields(tmp_path / "in.jsonl", "v") == [{"v": text}]


def test_a_line_without_the_key_is_an_error_row(tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"text": "a", "v": "x"}\n{"text": "b"}\n{"text": "c", "v": "\\ud800"}\n'
    )
    good, lacking, bad = open_source([tmp_path / "in.jsonl"], Columns(fields=("v",)))
    assert good.source.fields == {"v": "x"}
    assert (lacking.kind, lacking.lacks) == ("missing_field", "v")
    assert lacking.message == ("in.jsonl line 2: there is no 'v'; it has: text (--prompt-template writes it)")
    assert bad.kind == "bad_utf8"


def test_the_hash_of_a_row_hangs_on_its_columns(path):
    plain, one, other = (
        [row_hash(record) for record in open_source([path], Columns(fields=names))]
        for names in ((), ("party",), ("a b",))
    )
    assert len({*plain, *one, *other}) == 6


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "prompt.jinja"
    path.write_text("{{ row.party }} ({{ row['a b'] }}): {{ document }}")
    return path


def test_a_run_answers_again_what_changed(call, tmp_path, template, capfd):
    path, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    WRITE["in.parquet"](path)
    words = (path, output, "--prompt-template", template, "--max-new-tokens", 2)
    assert call(*words) == 0
    first = pq.read_table(output).to_pylist()
    assert [row["status"] for row in first] == ["ok", "ok"]
    assert [row["party"] for row in first] == ["Acme", None]
    pq.write_table(pa.Table.from_pylist([{**ROWS[0], "party": "Bell"}, ROWS[1]]), path)
    assert call(*words, "--resume") == 0
    second = pq.read_table(output).to_pylist()
    assert first[0]["row_hash"] != second[0]["row_hash"]
    assert first[1] == second[1]


def test_a_dry_run_names_the_columns(call, tmp_path, template, capfd):
    WRITE["in.csv"](tmp_path / "in.csv")
    words = ("--prompt-template", template, "--dry-run")
    assert call(tmp_path / "in.csv", tmp_path / "out.parquet", *words) == 0
    assert "columns in the prompt: party, a b\n" in capfd.readouterr().out


def test_a_wrong_name_is_one_line_before_the_model_is_opened(refusal, tmp_path, template):
    WRITE["in.jsonl"](tmp_path / "in.jsonl")
    template.write_text("{{ document }}{{ row.partie }}")
    words = ("--prompt-template", template, "--model", tmp_path / "none")
    assert refusal(tmp_path / "in.jsonl", tmp_path / "out.parquet", *words).startswith(
        "in.jsonl has no column 'partie' (did you mean 'party'?)"
    )


def test_parts_of_a_long_document_have_the_columns_too(call, tmp_path, template):
    rows = [{"text": "some words. " * 200, "party": "Acme", "a b": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    words = ("--prompt-template", template, "--max-new-tokens", 4, "--on-overlong", "split")
    combine = tmp_path / "combine.jinja"
    combine.write_text("{{ row.party }} says: {{ document }}")
    words = (*words, "--combine-template", combine)
    assert call(tmp_path / "in.parquet", tmp_path / "out.parquet", *words) == 0
    (row,) = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["status"] == "ok"
    assert len(row["parts"]) > 2
