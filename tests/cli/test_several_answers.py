"""`--n`: several answers to each prompt, in the output, the batch form, the summary and from Python."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai.types.chat import ChatCompletion
from row_files import read, write

from pipeline import answer

DRAWN = ["--device", "cpu", "--temperature", "1.2", "--max-new-tokens", "8", "--quiet"]
STRUCT = pa.struct(
    [
        ("answer", pa.large_string()),
        ("reasoning", pa.large_string()),
        ("finish_reason", pa.string()),
        ("new_tokens", pa.int32()),
    ]
)


@pytest.fixture
def source(tmp_path):
    rows = [{"id": str(n), "text": f"{n} fish " * (4 + n), "question": "how many?"} for n in range(5)]
    return write(tmp_path / "in.jsonl", rows)


def texts(rows):
    return [[each["answer"] for each in row["answers"]] for row in rows]


def test_the_output_lists_them_and_begins_with_the_first(call, source, tmp_path, capsys):
    single, several = tmp_path / "one.parquet", tmp_path / "three.parquet"
    assert call(source, single, *DRAWN) == 0
    assert call(source, several, *DRAWN, "--n", 3, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert "answers" not in pq.read_schema(single).names
    names = pq.read_schema(several).names
    assert names[names.index("answer") + 1] == "answers"
    assert pq.read_schema(several).field("answers").type == pa.list_(STRUCT)
    one, three = read(single), read(several)
    for alone, row in zip(one, three, strict=True):
        first = row["answers"][0]
        for name in ("answer", "finish_reason"):
            assert row[name] == first[name] == alone[name]
        assert first["new_tokens"] == alone["new_tokens"]
        assert row["new_tokens"] == sum(each["new_tokens"] for each in row["answers"])
        assert row["prompt_tokens"] == alone["prompt_tokens"]
    assert all(len(set(answers)) == 3 for answers in texts(three))
    assert summary["new_tokens"] == sum(row["new_tokens"] for row in three)
    assert summary["prompt_tokens"] == sum(row["prompt_tokens"] for row in one)
    ended = [each["finish_reason"] for row in three for each in row["answers"]]
    assert summary["ended_by_length"] == ended.count("length") > 5
    assert call(source, tmp_path / "3.jsonl", *DRAWN, "--n", 3) == 0
    assert read(tmp_path / "3.jsonl") == [
        {**written, **{name: row[name] for name in ("answer", "answers", "finish_reason")}}
        for written, row in zip(read(tmp_path / "3.jsonl"), three, strict=True)
    ]


def test_how_answers_are_packed_changes_none(call, source, tmp_path):
    flags = {"a": [], "b": ["--in-flight", 2, "--pack-tokens", 1], "c": ["--group", "off", "--lookup", 2]}
    for name, given in flags.items():
        assert call(source, tmp_path / f"{name}.parquet", *DRAWN, "--n", 3, *given) == 0
    found = [texts(read(tmp_path / f"{name}.parquet")) for name in flags]
    assert found[0] == found[1] == found[2]


def test_a_run_goes_on_with_as_many_and_with_no_other_number(call, source, tmp_path, capsys):
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    assert call(source, whole, *DRAWN, "--n", 3) == 0
    assert call(source, parts, *DRAWN, "--n", 3, "--limit", 2) == 0
    assert call(source, parts, *DRAWN, "--n", 2, "--resume") == 2
    assert "n was 3 and is now 2" in capsys.readouterr().err
    assert call(source, parts, *DRAWN, "--resume") == 2
    assert call(source, parts, *DRAWN, "--n", 3, "--resume") == 0
    assert texts(read(parts)) == texts(read(whole))


REFUSED = {
    "greedy": (["--n", 3], "--n 3 needs a --temperature above 0"),
    "next to greedy": (["--n", 3, "--temperature", "1e-9"], "--n 3 needs a --temperature above 0"),
    "in parts": (["--n", 3, "--temperature", 1, "--on-overlong", "split"], "--n 3 and --on-overlong split"),
    "offloaded": (
        ["--n", 3, "--temperature", 1, "--method", "sliminfer", "--kv-memory", "1GiB"],
        "--n 3 and --kv-memory exclude each other",
    ),
    "none": (["--n", 0], "--n"),
    "too many": (["--n", 1025, "--temperature", 1], "--n"),
    "a column without more than one": (["--columns", "answer,answers"], "--columns answers needs --n"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_a_fault_of_usage(call, kind, source, tmp_path, capsys):
    flags, message = REFUSED[kind]
    assert call(source, tmp_path / "out.parquet", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_summary_may_have_several_if_it_has_no_parts(call, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "many fish " * 9}, {"text": "many fish " * 500}])
    out = tmp_path / "out.parquet"
    assert call(source, out, *DRAWN, "--summarise", "--n", 2) == 0
    first, second = read(out)
    assert len(first["answers"]) == 2
    assert (second["status"], second["error_type"], second["answers"]) == ("error", "over_long", None)


def test_columns_are_chosen_like_others(call, source, tmp_path):
    out = tmp_path / "out.jsonl"
    assert call(source, out, *DRAWN, "--n", 2, "--columns", "answers,stats") == 0
    row = read(out)[0]
    assert len(row["answers"]) == 2
    assert "answer" not in row
    assert row["stats"]["new_tokens"] == sum(each["new_tokens"] for each in row["answers"])


def test_a_column_of_that_name_is_copied_as_ever_where_there_is_one_answer(call, tmp_path):
    rows = [{"text": "two fish", "question": "how many?", "answers": ["two", "2"]}]
    source, flags = write(tmp_path / "in.parquet", rows), [*DRAWN, "--keep-columns", "answers"]
    for name in ("out.parquet", "out.jsonl"):
        assert call(source, tmp_path / name, *flags) == 0
        (row,) = read(tmp_path / name)
        assert row["answers"] == ["two", "2"]
        assert call(source, tmp_path / name, *flags, "--resume") == 0
        assert call(source, tmp_path / f"several-{name}", *flags, "--n", 2) == 0
        (row,) = read(tmp_path / f"several-{name}")
        assert len(row["answers"]) == 2
        assert row["answers_input"] == ["two", "2"]


@pytest.mark.parametrize("columns", [[], ["--columns", "answer"]])
def test_a_response_has_a_choice_for_each(call, columns, tmp_path):
    address = {"method": "POST", "url": "/v1/chat/completions"}
    said = [{"role": "user", "content": "one fish two fish\n\nHow many fish?"}]
    lines = [{"custom_id": f"r{n}", **address, "body": {"messages": said}} for n in range(3)]
    source, out, table = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tmp_path / "out.parquet"
    assert call(source, out, *DRAWN, "--n", 3, "--limit", 2, *columns) == 0
    assert call(source, out, *DRAWN, "--n", 3, "--resume", *columns) == 0
    assert call(source, table, *DRAWN, "--n", 3) == 0
    for line, row in zip(read(out), read(table), strict=True):
        completion = ChatCompletion.model_validate(line["response"]["body"])
        assert [choice.index for choice in completion.choices] == [0, 1, 2]
        assert [choice.message.content for choice in completion.choices] == texts([row])[0]
        assert completion.usage.completion_tokens == row["new_tokens"]


def test_rows_in_memory_have_a_list_of_dicts(model_folder):
    rows = [{"text": "one fish two fish", "question": "how many?"}]
    options = {"model": str(model_folder), "device": "cpu", "temperature": 1.2, "max_new_tokens": 8}
    (several,) = answer(rows, n=3, **options)
    (single,) = answer(rows, **options)
    assert [set(each) for each in several["answers"]] == [{field.name for field in STRUCT}] * 3
    assert several["answer"] == several["answers"][0]["answer"] == single["answer"]
    assert "answers" not in single
    assert answer(rows, n=2, **options).table().schema.field("answers").type == pa.list_(STRUCT)
