"""`--json-schema`, `--regex`, `--choices` and `--logprobs` from the command line to the output."""

from __future__ import annotations

import json
import math
import sys

import pyarrow as pa
import pytest
from chains import BEGINNING, CLOSES, END, OPENS, save_chain
from prompt_parts import space_tokenizer
from row_files import read, write

from marsinfer_cli.app import run
from pipeline import answer
from pipeline.checkpoints import random_weights
from pipeline.errors import ConfigError

ASK = ("--text-column", "body", "--question-column", "ask", "--id-column", "doc")
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", None]},
        "fish": {"type": "array", "maxItems": 2, "items": {"type": "integer", "minimum": 0, "maximum": 9}},
        "note": {"type": "string", "maxLength": 5},
    },
    "required": ["colour", "fish", "note"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def check(text):
    value = json.loads(text)
    assert list(value) == ["colour", "fish", "note"]
    assert value["colour"] in ("red", "blue", None)
    assert all(0 <= count <= 9 for count in value["fish"])
    assert len(value["note"]) <= 5


@pytest.mark.parametrize("drawn", [(), ("--temperature", "1.5", "--seed", "3")], ids=["greedy", "drawn"])
def test_answers_are_json_under_a_schema(call, fish, schema, tmp_path, drawn):
    out = tmp_path / "out.parquet"
    assert call(fish, out, *ASK, "--json-schema", schema, *drawn) == 0
    rows = read(out)
    assert [(row["status"], row["finish_reason"]) for row in rows] == [("ok", "stop")] * 3
    for row in rows:
        check(row["answer"])
    assert not {"mean_logprob", "min_logprob", "choice_logprobs"} & set(rows[0])


@pytest.mark.parametrize("kind", ["bytes", "SentencePiece"])
def test_a_model_of_noise_writes_json_with_either_kind_of_tokenizer(
    fish, schema, tmp_path, kind, monkeypatch
):
    if kind == "SentencePiece":
        monkeypatch.setattr(random_weights, "byte_tokenizer", space_tokenizer)
    out = tmp_path / "out.jsonl"
    words = ["--model", "random:tiny", "--device", "cpu", "--method", "dense", "--json-schema", schema]
    assert run(["batch", *map(str, [fish, out, *ASK, *words])]) == 0
    for row in read(out):
        check(row["answer"])


def test_choices_with_their_probabilities(call, fish, tmp_path):
    for name in ("out.parquet", "out.jsonl"):
        assert call(fish, tmp_path / name, *ASK, "--choices", "red,blue,no colour", "--logprobs") == 0
        for row in read(tmp_path / name):
            shares = {each["choice"]: math.exp(each["logprob"]) for each in row["choice_logprobs"]}
            assert list(shares) == ["red", "blue", "no colour"]
            assert sum(shares.values()) == pytest.approx(1)
            assert row["answer"] == max(shares, key=shares.get)
            assert row["min_logprob"] <= row["mean_logprob"] < 0


def test_log_probabilities_need_no_form(call, fish, tmp_path):
    out = tmp_path / "out.parquet"
    assert call(fish, out, *ASK, "--logprobs", "--max-new-tokens", 4, "--columns", "answer") == 0
    rows = read(out)
    assert all(row["min_logprob"] <= row["mean_logprob"] < 0 for row in rows)
    assert "choice_logprobs" not in rows[0]


def test_an_answer_that_is_cut_is_an_error_row_and_retried(call, fish, schema, tmp_path):
    out = tmp_path / "out.parquet"
    words = [fish, out, *ASK, "--regex", "[0-9]{20}", "--max-new-tokens"]
    assert call(*words, 10) == 3
    assert {(row["error_type"], row["answer"]) for row in read(out)} == {("incomplete", None)}
    assert call(*words, 20, "--overwrite") == 0
    assert all(row["answer"].isdigit() and len(row["answer"]) == 20 for row in read(out))


def test_the_form_belongs_to_what_a_run_is_resumed_with(call, fish, schema, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    words = [fish, out, *ASK, "--json-schema", schema]
    assert call(*words, "--limit", 1) == 0
    first = read(out)
    assert call(*words, "--resume") == 0
    assert read(out)[0] == first[0]
    assert len(read(out)) == 3
    schema.write_text(json.dumps(SCHEMA, indent=1))
    assert call(*words, "--resume") == 0  # which says the same
    schema.write_text(json.dumps({**SCHEMA, "required": ["colour"]}))
    capfd.readouterr()
    assert call(*words, "--resume") == 2
    assert "was begun with other settings: response_format was" in capfd.readouterr().err
    assert call(fish, out, *ASK, "--resume") == 2
    assert call(*words, "--logprobs", "--resume") == 2


REFUSED = {
    "two forms": (("--regex", "a", "--choices", "a,b"), "--regex and --choices exclude each other"),
    "stop": (("--regex", "a", "--stop", "x"), "--stop and --regex a exclude each other"),
    "drafts": (("--choices", "a,b", "--lookup", "4"), "--lookup 4 and --choices exclude each other"),
    "one choice": (("--choices", "a"), "--choices needs at least two texts"),
    "a choice twice": (("--choices", "a,b,a"), "--choices: 'a' is given twice"),
    "an empty choice": (("--choices", "a,,b"), "--choices 'a,,b': write values with commas between them"),
    "no choice": (("--choices", ""), "--choices"),
    "an empty expression": (("--regex", ""), "--regex is empty"),
    "no expression": (("--regex", "[0-9"), "--regex [0-9 cannot be used: unclosed character class"),
    "one that matches nothing": (("--regex", "a[b&&c]"), "cannot be used: it matches nothing"),
    "no file": (("--json-schema", "nope.json"), "--json-schema nope.json cannot be read"),
    "no schema": (("--json-schema", "{"), "--json-schema is not JSON"),
    "an unknown type": (("--json-schema", '{"type": "word"}'), "cannot be used: Invalid type: word"),
    "a column": (("--columns", "mean_logprob"), "--columns 'mean_logprob': --logprobs adds it"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_before_there_is_a_model(fish, tmp_path, capfd, kind):
    flags, message = REFUSED[kind]
    words = [fish, tmp_path / "out.parquet", *ASK, "--model", tmp_path / "no model", "--method", "dense"]
    assert run(["batch", *map(str, [*words, *flags])]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out.parquet").exists()


def test_the_extra_is_named_where_it_is_missing(fish, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    words = [fish, tmp_path / "out.parquet", *ASK, "--model", tmp_path / "no model", "--regex", "unseen"]
    assert run(["batch", *map(str, words)]) == 2
    told = "--regex unseen needs llguidance: pip install 'marsinfer[structured]'"
    assert told in capfd.readouterr().err


def test_what_the_model_cannot_write_is_refused_before_its_weights(call, fish, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        "pipeline.checkpoints.random_weights.byte_tokenizer", lambda: space_tokenizer(byte_fallback=False)
    )
    words = [fish, tmp_path / "out.parquet", *ASK, "--model", "random:tiny", "--choices", "no,\N{EURO SIGN}"]
    assert call(*words, "--dry-run") == 2
    assert "--choices: the model has no tokens for '\N{EURO SIGN}'" in capfd.readouterr().err


def test_dry_run_takes_a_form(call, fish, schema, tmp_path):
    assert call(fish, tmp_path / "out.parquet", *ASK, "--json-schema", schema, "--dry-run") == 0


def test_from_python(model_folder, fish):
    rows = read(fish)
    options = {"model": model_folder, "method": "dense", "device": "cpu", "text_column": "body"}
    options |= {"question_column": "ask", "id_column": "doc"}
    choices = ["one, two", "none"]
    made = list(answer(rows, **options, choices=choices, logprobs=True))
    assert {row["answer"] for row in made} <= set(choices)
    assert [each["choice"] for each in made[0]["choice_logprobs"]] == choices
    for row in answer(rows, **options, json_schema=json.dumps(SCHEMA)):
        check(row["answer"])
    with pytest.raises(ConfigError, match="has white space around it"):
        answer(rows, **options, choices=["a", " b"])


@pytest.mark.parametrize("begun", [True, False])
def test_reasoning_stands_before_the_form(fish, tmp_path, begun):
    chain = (OPENS, "a", "b", "c", CLOSES, "ĊĊ", "d", "e", "f", END)
    folder = save_chain(tmp_path / "m", *((chain, BEGINNING) if begun else ()))
    out = tmp_path / "out.parquet"
    words = ["--model", folder, "--method", "dense", "--regex", "[d-f]{2}", "--logprobs"]
    assert run(["batch", *map(str, [fish, out, *ASK, *words])]) == 0
    for row in read(out):
        assert row["reasoning"]
        assert row["answer"] in {a + b for a in "def" for b in "def"}
        assert row["mean_logprob"] <= 0


def test_without_reasoning_the_form_begins_at_once(fish, tmp_path):
    folder = save_chain(tmp_path / "m")
    out = tmp_path / "out.parquet"
    words = ["--model", folder, "--method", "dense", "--regex", "[d-f]{2}"]
    off = ("--template-arg", "enable_thinking=false")
    assert run(["batch", *map(str, [fish, out, *ASK, *words, *off])]) == 0
    assert {(row["reasoning"], len(row["answer"])) for row in read(out)} == {(None, 2)}


def body(**fields):
    said = [{"role": "user", "content": "one fish two fish\n\nHow many fish?"}]
    return {"model": "m", "messages": said, "max_tokens": 60, **fields}


def line(number, **fields):
    address = {"method": "POST", "url": "/v1/chat/completions"}
    return {"custom_id": f"r{number}", **address, "body": body(**fields)}


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "fish", "strict": True, "schema": schema}}


def test_requests_say_their_forms_themselves(call, tmp_path):
    bad = {"type": "word"}
    requests = [
        line(0),
        line(1, response_format=form(SCHEMA)),
        line(2, response_format=form(SCHEMA), temperature=1.0, seed=2),
        line(3, response_format={"type": "text"}),
        line(4, response_format=form(bad)),
        line(5, response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
        line(6, response_format={"type": "grammar"}),
        line(7, response_format=form(SCHEMA), stop="x"),
        line(8, response_format=form(SCHEMA), max_tokens=3),
        line(9, response_format={"type": "json_object"}),
    ]
    out = tmp_path / "out.jsonl"
    call(write(tmp_path / "in.jsonl", requests), out)
    said = {
        row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in read(out)
    }
    check(said["r1"])
    check(said["r2"])
    assert said["r0"] == said["r3"]
    errors = {
        row["custom_id"]: row["response"]["body"]["error"] for row in read(tmp_path / "out.errors.jsonl")
    }
    codes = {name: error["code"] for name, error in errors.items()}
    expected = {
        "r4": "unsupported",
        "r5": "bad_request",
        "r6": "bad_request",
        "r7": "unsupported",
        "r8": "incomplete",
    }
    assert {name: code for name, code in codes.items() if name != "r9"} == expected
    assert codes.get("r9") == "incomplete" or json.loads(said["r9"]) is not None
    assert "'response_format' cannot be used: Invalid type: word" in errors["r4"]["message"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.arrow", "out.parquet"])
def test_log_probabilities_come_back_in_a_resumed_run_and_a_merged_output(call, fish, tmp_path, name):
    words = (*ASK, "--choices", "red,blue,no colour,none", "--logprobs", "--columns", "answer,stats")
    whole, out = tmp_path / f"whole-{name}", tmp_path / name
    assert call(fish, whole, *words) == 0
    assert call(fish, out, *words, "--limit", 2) == 0
    assert call(fish, out, *words, "--resume") == 0
    shards = [tmp_path / f"{n}-{name}" for n in (1, 2)]
    for number, shard in enumerate(shards, start=1):
        assert call(fish, shard, *words, "--shard", f"{number}/2") == 0
    merged = tmp_path / f"merged-{name}"
    assert run(["merge", *map(str, [merged, *shards])]) == 0

    def scores(path):
        rows = pa.ipc.open_file(path).read_all().to_pylist() if path.suffix == ".arrow" else read(path)
        return [[row[name] for name in ("answer", "mean_logprob", "choice_logprobs")] for row in rows]

    expected = scores(whole)
    assert all(each["logprob"] < 0 for *_, listed in expected for each in listed)
    for path in (out, merged):
        for found, wanted in zip(scores(path), expected, strict=True):
            assert found[0] == wanted[0]
            assert found[1] == pytest.approx(wanted[1], rel=1e-3)
            assert found[2] == [
                each | {"logprob": pytest.approx(each["logprob"], rel=1e-3)} for each in wanted[2]
            ]


def test_requests_under_a_form_of_the_run(call, tmp_path):
    source = write(tmp_path / "in.jsonl", [line(0), line(1, stop="e"), line(2, response_format=form(SCHEMA))])
    out = tmp_path / "out.jsonl"
    assert call(source, out, "--choices", "red,blue", "--logprobs") == 0
    first, second, third = read(out)
    for row in (first, second):
        assert row["response"]["body"]["choices"][0]["message"]["content"] in ("red", "blue")
        assert len(row["marsinfer"]["choice_logprobs"]) == 2
    check(third["response"]["body"]["choices"][0]["message"]["content"])
    assert third["marsinfer"]["choice_logprobs"] is None
    assert call(source, out, "--choices", "red,blue", "--logprobs", "--resume") == 0
    assert read(out) == [first, second, third]
