"""What `marsinfer check` refuses, word for word."""

from __future__ import annotations

import json

import pytest
from check_runs import ASK, REFERENCES, ROWS, check_with, refusal_of, write_rows

from marsinfer_cli.app import run


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "fish.jsonl")


@pytest.fixture
def check(sharp_model_folder, monkeypatch):
    monkeypatch.setenv("MARSINFER_METHOD", "dense")
    return check_with(sharp_model_folder)


@pytest.fixture
def refusal(check, capfd):
    return refusal_of(check, capfd)


REFUSED = [
    (["--max-drop", "1"], "--max-drop '1': write a number and unit, 1pt"),
    (["--max-drop", "-1pt"], "--max-drop '-1pt': write a number and unit"),
    (["--suite", "squad:x"], "unknown suite 'squad:x'; write leval:DIR, longbench:DIR or needles"),
    (
        ["--suite", "needles", "--needle-kinds", "singel"],
        "unknown kind of needles 'singel' (did you mean 'single'?)",
    ),
    (["--suite", "needles", "--needle-lengths", "4k"], "--needle-lengths: 4,096 tokens exceed 1,016"),
    (["--needle-count", "25"], "--needle-count needs --suite needles, without which there are none"),
    (
        ["--suite", "needles", "--tasks", "needles-single"],
        "--tasks names 'needles-single'; kinds of needles are chosen by --needle-kinds",
    ),
    (["--limit", "2", "--tasks", "odd"], "--tasks names 'odd'; with --limit 2 there are fish"),
    (["--metric", "accuracy"], "--metric 'accuracy': choose from token-accuracy, nll, "),
    (["--metric", "rouge-l"], "--metric rouge-l needs generated answers: add --generate"),
    (["--metric", "nll", "--max-drop", "1pt"], "--max-drop 1pt: nll has no points"),
    (["--resume"], "--resume needs --out FILE: "),
    (["--overwrite-baseline"], "--overwrite-baseline needs --baseline FILE"),
    (["--method", "dens"], "unknown method 'dens' (did you mean 'dense'?)"),
    (["--limit", "0"], "--limit 0: must be a whole number of at least 1"),
    (["--junit", "x.xml", "--markdown", "x.xml"], "--markdown and --junit name one file, x.xml"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_flags_that_cannot_work(refusal, data, flags, message):
    assert refusal(data, *REFERENCES, *flags).startswith(message)


@pytest.mark.parametrize(("flag", "value"), [("--sample", "9"), ("--shard", "1/2")])
def test_rows_of_suites_are_not_drawn_as_those_of_an_input(refusal, tmp_path, flag, value):
    assert refusal("--suite", f"leval:{tmp_path}", flag, value) == (
        f"{flag} takes rows of INPUT, which is not given; of a suite take some with --limit, "
        "--limit-per-task, --tasks or --document-shard"
    )


def test_data_that_cannot_work(refusal, data, tmp_path):
    assert refusal() == "nothing to check: give INPUT or --suite leval:DIR or longbench:DIR"
    assert refusal(data, *ASK, "--generate").startswith("--generate scores answers against references")
    assert refusal(data, *ASK, "--metric", "found").startswith("--metric found needs references")
    assert refusal(data, *ASK, "--suite", "needles").startswith("--question-column is of INPUT's own rows")
    assert refusal("--suite", "needles").startswith(
        "--suite needles hides them in documents: give INPUT, or another suite"
    )
    assert refusal("--suite", f"leval:{tmp_path}/gone").startswith(f"suite 'leval:{tmp_path}/gone'")
    assert refusal(data, *ASK, "--reference-column", "write").startswith(
        f"8 of 8 rows cannot be checked: {data.name} line 1: no reference in column 'write'"
    )
    twins = tmp_path / "twins.jsonl"
    twins.write_text(2 * (json.dumps(ROWS[0]) + "\n"))
    assert refusal(twins, *ASK) == "two rows have the id 'row-0': twins.jsonl line 1 and twins.jsonl line 2"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert refusal(empty, *ASK) == f"{empty} has no rows"


def test_a_column_that_a_table_lacks(refusal, fish):
    told = refusal(fish, "--question-column", "ask", "--reference-column", "right")
    assert told == "there is no column 'right' to keep; it has: doc, body, ask, year"


def test_storage_that_is_not_there(check, data, tmp_path, capfd):
    assert check(data, *ASK, "--junit", tmp_path / "gone" / "x.xml") == 8
    assert f"--junit {tmp_path}/gone/x.xml cannot be written: there is no folder" in capfd.readouterr().err


CHAT = [{"role": "user", "content": "one fish\n\nhow many?"}]
ADDRESS = {"custom_id": "a", "method": "POST"}
FOR_BATCH = {
    "messages": {"messages": CHAT},
    "a chat request": {**ADDRESS, "url": "/v1/chat/completions", "body": {"messages": CHAT}},
    "a prompt": {**ADDRESS, "url": "/v1/completions", "body": {"prompt": "one fish"}},
}


@pytest.mark.parametrize("kind", FOR_BATCH)
@pytest.mark.parametrize("command", ["check", "calibrate"])
def test_rows_that_batch_alone_answers(sharp_model_folder, tmp_path, capfd, command, kind):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(FOR_BATCH[kind]) + "\n")
    method = ["--method", "marsinfer", "--set", "start_layer=1"] if command == "check" else []
    assert run([command, str(path), "--model", str(sharp_model_folder), *method, "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "marsinfer: error: 1 of 1 rows cannot be checked: in.jsonl line 1 has messages, or is a request of "
        "OpenAI's Batch API, which marsinfer batch alone answers"
    )
