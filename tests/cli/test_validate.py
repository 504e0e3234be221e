"""--validate, --retries and --expand: answers held against a JSON schema, drawn again, and typed."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import read, write

import pipeline
from pipeline.setup import validity

pytestmark = pytest.mark.slow

OBJECT = {"type": "object", "properties": {"amount": {"type": "number"}}}
ANYTHING = {}
ROWS = [{"id": f"r{n}", "text": f"fish {n} " * 9, "value": n} for n in range(4)]
ROWS[2]["text"] = ""
FLAGS = ["--question", "what?", "--max-new-tokens", "3", "--quiet"]


@pytest.fixture
def given(tmp_path):
    return write(tmp_path / "in.jsonl", ROWS)


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(OBJECT))
    return path


@pytest.fixture
def even(monkeypatch):
    """Valid are answers of an even number of UTF-8's bytes, which about half of all are."""
    monkeypatch.setattr(validity, "is_valid", lambda answer, schema: _is_even(answer))


def _is_even(answer):
    return sum(answer.encode()) % 2 == 0


def column(rows, name):
    return [row[name] for row in rows]


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_answers_are_told_to_be_valid_or_not(call, given, schema, tmp_path, name, capfd):
    plain, out = tmp_path / "plain.parquet", tmp_path / name
    assert call(given, plain, *FLAGS) == 0
    assert not {"valid", "tries"} & set(read(plain)[0])
    capfd.readouterr()
    assert call(given, out, *FLAGS, "--validate", schema, "--json") == 0
    summary = json.loads(capfd.readouterr().out)
    assert (summary["invalid_answers"], summary["redrawn_answers"]) == (3, 0)
    rows = read(out)
    assert column(rows, "valid") == [False, False, None, False]
    assert column(rows, "tries") == [1, 1, None, 1]
    assert column(rows, "answer") == column(read(plain), "answer")
    assert column(rows, "status") == ["ok", "ok", "error", "ok"]


def test_answers_that_are_never_valid_are_drawn_as_often_as_is_asked(call, given, schema, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    assert call(given, out, *FLAGS, "--validate", schema, "--retries", "2", "--json") == 0
    printed = capfd.readouterr()
    summary = json.loads(printed.out)
    assert (summary["invalid_answers"], summary["redrawn_answers"]) == (3, 6)
    rows = read(out)
    assert column(rows, "tries") == [3, 3, None, 3]
    assert column(rows, "valid") == [False, False, None, False]


@pytest.mark.usefixtures("even")
def test_each_row_is_drawn_until_it_is_valid_however_rows_are_batched(call, given, schema, tmp_path):
    asked = [*FLAGS, "--validate", schema]
    first = tmp_path / "first.parquet"
    assert call(given, first, *asked) == 0
    made = []
    for flags in ([], ["--in-flight", "1", "--pack-tokens", "1"], ["--group", "off", "--in-flight", "2"]):
        out = tmp_path / f"{len(made)}.parquet"
        assert call(given, out, *asked, "--retries", "40", *flags) == 0
        made.append([(row["answer"], row["valid"], row["tries"]) for row in read(out)])
    assert made[0] == made[1] == made[2]
    answers = [each for each in made[0] if each[0] is not None]
    assert len(answers) == 3
    assert all(valid and _is_even(answer) for answer, valid, _ in answers)
    assert max(tries for *_, tries in answers) > 1
    kept = zip(read(first), made[0], strict=True)
    assert all(before["answer"] == answer for before, (answer, _, tries) in kept if tries == 1)


@pytest.mark.usefixtures("even")
def test_named_questions_are_drawn_again_each_by_its_schema(call, given, tmp_path):
    questions, out = tmp_path / "q.json", tmp_path / "out.parquet"
    asked = [
        {"name": "free", "question": "what?"},
        {"name": "typed", "question": "what?", "schema": OBJECT},
    ]
    questions.write_text(json.dumps(asked))
    flags = ["--questions", questions, "--max-new-tokens", "3", "--quiet", "--retries", "40"]
    assert call(given, out, *flags) == 0
    free, typed = ([row[name] for row in read(out)] for name in ("free", "typed"))
    assert column(free, "valid") == column(free, "tries") == [None] * 4
    assert column(typed, "valid") == [True, True, None, True]
    assert max(row["tries"] or 0 for row in typed) > 1


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_resume_goes_on_under_the_same_schema_alone(call, refusal, given, schema, tmp_path, name, capfd):
    out, asked = tmp_path / name, [*FLAGS, "--validate", schema, "--retries", "1"]
    assert call(given, out, *asked, "--limit", "2") == 0
    before = read(out)
    assert call(given, out, *asked, "--resume") == 0
    assert read(out)[:2] == before
    assert column(read(out), "tries") == [2, 2, None, 2]
    capfd.readouterr()
    told = refusal(given, out, *asked[:-1], "2", "--resume")
    assert told.startswith(f"{out} was begun with other settings: validity.retries was 1 and is now 2")
    schema.write_text(json.dumps(OBJECT, indent=3))  # which says the same
    assert call(given, out, *asked, "--resume") == 0
    capfd.readouterr()
    schema.write_text(json.dumps(ANYTHING))
    told = refusal(given, out, *asked, "--resume")
    assert told.startswith(f"{out} was begun with other settings: validity.schema_sha256 was")


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.arrow"])
def test_typed_values_stand_in_a_column(call, given, schema, tmp_path, name):
    out = tmp_path / name
    assert call(given, out, *FLAGS, "--validate", schema, "--expand", "--columns", "answer") == 0
    table = pa.ipc.open_file(out).read_all() if name.endswith("arrow") else None
    if name.endswith("parquet"):
        table = pq.read_table(out)
    names = ["id", "row", "question_index", "status", "answer", "valid", "tries", "error_type", "row_hash"]
    if table is None:
        (first, *_) = read(out)
        assert list(first) == [*names, "value", "value_input"]
        assert [first["value"], first["value_input"]] == [None, 0]
    else:
        assert table.column_names == [*names, "value", "extra"]
        assert table.schema.field("value").type == pa.struct([("amount", pa.float64())])
        assert table["value"].null_count == 4


def test_values_are_typed_later_without_new_answers(call, given, schema, tmp_path, capfd):
    out, asked = tmp_path / "out.parquet", [*FLAGS, "--validate", schema]
    assert call(given, out, *asked) == 0
    capfd.readouterr()
    assert call(given, out, *asked, "--expand", "--resume") == 0
    assert "nothing new: every row was done\n" in capfd.readouterr().err
    assert "value" in pq.read_schema(out).names
    assert call(given, out, *asked, "--expand", "--resume") == 0
    assert "stays as it is" in capfd.readouterr().err


def test_requests_are_held_against_the_schema_too(call, refusal, schema, tmp_path, capfd):
    body = {"model": "m", "messages": [{"role": "user", "content": "one fish two fish"}], "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    given = write(tmp_path / "in.jsonl", [line, {**line, "custom_id": "b", "body": {**body, "seed": 3}}])
    out, asked = tmp_path / "out.jsonl", ["--validate", schema, "--retries", "1", "--quiet"]
    assert call(given, out, *asked) == 0
    assert [(row["marsinfer"]["valid"], row["marsinfer"]["tries"]) for row in read(out)] == [(False, 2)] * 2
    assert call(given, tmp_path / "out.parquet", *asked, "--expand") == 0
    assert column(read(tmp_path / "out.parquet"), "value") == [None, None]
    capfd.readouterr()
    assert refusal(given, tmp_path / "typed.jsonl", *asked, "--expand") == (
        "--expand: JSON lines in the Batch API's form have no columns; name a .parquet or .arrow output"
    )


def test_rows_in_memory_have_values_too(schema, model_folder):
    options = {"question": "what?", "max_new_tokens": 3, "validate": schema, "expand": True}
    rows = list(pipeline.answer(ROWS, model=str(model_folder), method="dense", **options))
    assert column(rows, "valid") == [False, False, None, False]
    assert column(rows, "value") == [None] * 4
    assert column(rows, "value_input") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--validate", "gone.json"], "--validate gone.json cannot be read: "),
        (["--retries", "1"], "--retries needs a JSON schema: give --validate FILE, or one in --questions"),
        (
            ["--expand"],
            "--expand needs a JSON schema: give --validate FILE or --json-schema, or one in --questions",
        ),
        (["--validate", "s.json", "--retries", "101"], "--retries 101: must be between 0 and 100"),
        (["--validate", "no.json"], "--validate no.json is not a JSON schema at /type: 'no' is not valid"),
        (
            ["--validate", "s.json", "--expand", "--columns", "new_tokens"],
            "--expand makes its column of the answers: --columns must have answer too",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(refusal, given, tmp_path, schema, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.json").write_text('{"type": "no"}')
    assert refusal(given, tmp_path / "out.parquet", *FLAGS, *flags).startswith(told)
