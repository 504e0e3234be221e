"""Methods that hold keys before RoPE: documents longer than the context, and flags that they refuse."""

from __future__ import annotations

import json

import pytest

METHODS = {
    "hip": ("keys=64", "sink=64", "window=64"),
    "cascade": ("tokens=256", "chunk=64"),
}


def flags(name):
    return ["--method", name, *(flag for each in METHODS[name] for flag in ("--set", each))]


@pytest.fixture
def rows(tmp_path):
    """One longer than the context of 1,024 tokens, and two shorter ones."""
    texts = ["one fish two fish " * 120, "blue fish", "red fish " * 40]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": each, "question": "what?"}) + "\n" for each in texts))
    return path


def answered(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_a_document_longer_than_the_context_is_answered(call, rows, tmp_path, name):
    of_method, of_dense = tmp_path / "out.jsonl", tmp_path / "dense.jsonl"
    assert call(rows, of_method, *flags(name), "--max-new-tokens", 8) == 0
    assert call(rows, of_dense, "--max-new-tokens", 8) == 0
    long, *short = answered(of_method)
    assert (long["status"], long["truncated_tokens"], long["new_tokens"]) == ("ok", 0, 8)
    assert long["prompt_tokens"] > 2000
    assert long["attention_ratio"] < 0.4
    refused, *dense = answered(of_dense)
    assert refused["error_type"] == "over_long"
    # the longer of them has more tokens than two of the caches of cascade
    assert [row["answer"] for row in short[:1]] == [row["answer"] for row in dense[:1]]


@pytest.mark.parametrize(
    "flag",
    [
        ("--kv-dtype", "fp8"),
        ("--kv-memory", "1GiB"),
        ("--linear-dtype", "mixed"),
        ("--group", "any"),
        ("--lookup", "4"),
        ("--n", "2", "--temperature", "1"),
    ],
    ids=lambda flag: flag[0],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_it_does_not_go_with_is_named(refusal, rows, tmp_path, name, flag):
    given = flag[0] if flag[0] in ("--n", "--kv-memory") else " ".join(flag[:2])
    assert refusal(rows, tmp_path / "out.jsonl", *flags(name), *flag) == (
        f"{given} and --method {name} exclude each other: it holds each document's keys before RoPE, in the "
        "model's dtype, and answers row by row"
    )


@pytest.mark.parametrize("name", METHODS)
def test_several_gpus_are_refused(refusal, rows, tmp_path, name):
    told = refusal(rows, tmp_path / "out.jsonl", *flags(name), "--tensor-parallel", "2")
    assert told.startswith(f"--tensor-parallel 2 and --method {name} exclude each other")


def test_a_context_without_room_leaves_long_rows_as_they_are(call, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    assert call(rows, out, "--method", "hip", "--max-new-tokens", 8) == 0
    assert [row["error_type"] for row in answered(out)] == ["over_long", None, None]
