"""Batch files of OpenAI's API, from the lines that a client writes to the files that it reads."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from forked import SAVED, held_run
from object_storage import objects, put
from openai.types import Completion, ErrorObject
from openai.types.chat import ChatCompletion
from row_files import read, write

from marsinfer_cli.app import run
from pipeline.storage.remote import place_of

GUIDES = Path(__file__).parents[2] / "examples" / "guides"
SYSTEM = {"role": "system", "content": "Be brief."}


def body(document="one fish two fish", **fields):
    said = [SYSTEM, {"role": "user", "content": f"{document}\n\nHow many fish?"}]
    return {"model": "gpt-4o-mini", "messages": said, "max_tokens": 4, **fields}


def line(number, given=None, **values):
    address = {"method": "POST", "url": "/v1/chat/completions"}
    return {"custom_id": f"r{number}", **address, "body": body() if given is None else given, **values}


@pytest.fixture
def source(tmp_path):
    """Requests of many kinds, some of which cannot be answered."""
    without_id = {name: value for name, value in line(5).items() if name != "custom_id"}
    rows = [
        line(0),
        line(1, body("red fish " * 20, max_completion_tokens=3, max_tokens=None)),
        line(2, body(temperature=1.0, seed=3, max_tokens=9)),
        line(3, body(tools=[{"type": "function"}])),
        line(0),
        without_id,
        {"text": "a row of another kind"},
        line(7, body(max_tokens=10_000_000)),
        line(8, body(best_of=4)),
        line(9, {}),
        line(10, body(temperature="hot")),
        line(11, url="/v1/embeddings"),
        line(12, body(stop=["fish", "."], top_p=0.9, temperature=0.7, max_tokens=12)),
    ]
    return write(tmp_path / "in.jsonl", rows)


KINDS = {
    "r3": "unsupported",
    "r0": "duplicate_id",
    "in.jsonl:5": "missing_id",
    "in.jsonl:6": "bad_request",
    "r7": "context_length_exceeded",
    "r8": "bad_request",
    "r9": "missing_messages",
    "r10": "bad_request",
    "r11": "unsupported",
}


def completions(path):
    return {row["custom_id"]: ChatCompletion.model_validate(row["response"]["body"]) for row in read(path)}


def told(completion):
    (choice,) = completion.choices
    return choice.message.content, choice.finish_reason, completion.usage.completion_tokens


def test_a_client_reads_both_files(call, source, tmp_path, capfd):
    assert call(source, tmp_path / "out.jsonl") == 0
    answers = completions(tmp_path / "out.jsonl")
    assert list(answers) == ["r0", "r1", "r2", "r12"]
    assert [each.usage.completion_tokens for each in answers.values()][:3] == [4, 3, 9]
    assert answers["r12"].usage.completion_tokens <= 12
    failed = read(tmp_path / "out.errors.jsonl")
    errors = {
        row["custom_id"]: ErrorObject.model_validate(row["response"]["body"]["error"]) for row in failed
    }
    assert {name: each.code for name, each in errors.items()} == KINDS
    assert {row["response"]["status_code"] for row in failed} == {400}
    assert {each.type for each in errors.values()} == {"invalid_request_error"}
    assert errors["r8"].message == "in.jsonl line 9: 'body' has an unknown field 'best_of'"
    assert "10,000,000 new tokens leave no room for a prompt" in errors["r7"].message
    printed = capfd.readouterr().err
    assert "the rows are requests of OpenAI's Batch API" in printed
    assert printed.count("requests ask for 'gpt-4o-mini': ") == 1
    assert "9 rows without an answer: out.errors.jsonl" in printed


def prompt(number, text, **fields):
    return line(number, {"prompt": text, "max_tokens": 4, **fields}, url="/v1/completions")


PROMPTS = [
    prompt(0, "one fish two fish\n\nHow many fish?"),
    prompt(1, ["one fish two fish\n\nHow many fish?"], max_tokens=6),
    prompt(2, [1, 2, 3]),
    prompt(3, "<|im_start|>user\nHow many fish?<|im_end|>\n"),
]


def test_prompts_are_answered_beside_messages(call, tmp_path):
    source = write(tmp_path / "in.jsonl", [*PROMPTS, line(4)])
    assert call(source, tmp_path / "out.jsonl") == 0
    bodies = {row["custom_id"]: row["response"]["body"] for row in read(tmp_path / "out.jsonl")}
    chat = ChatCompletion.model_validate(bodies.pop("r4"))
    texts = {name: Completion.model_validate(each) for name, each in bodies.items()}
    assert {name: each.usage.completion_tokens for name, each in texts.items()} == {"r0": 4, "r1": 6, "r3": 4}
    assert texts["r1"].choices[0].text.startswith(texts["r0"].choices[0].text)
    assert {each.object for each in texts.values()} == {"text_completion"}
    assert texts["r0"].usage.prompt_tokens < chat.usage.prompt_tokens
    (failed,) = read(tmp_path / "out.errors.jsonl")
    assert (failed["custom_id"], failed["response"]["body"]["error"]["code"]) == ("r2", "unsupported")
    before = (tmp_path / "out.jsonl").read_bytes()
    assert call(source, tmp_path / "out.jsonl", "--resume") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_model_without_chat_template_answers_prompts(model_folder, tmp_path, capfd):
    bare = shutil.copytree(model_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    words = ["batch", "--model", str(bare), "--method", "dense"]
    source = write(tmp_path / "in.jsonl", PROMPTS)
    assert run([*words, str(source), str(tmp_path / "out.jsonl")]) == 0
    assert [row["custom_id"] for row in read(tmp_path / "out.jsonl")] == ["r0", "r1", "r3"]
    capfd.readouterr()
    write(source, [line(0)])
    assert run([*words, str(source), str(tmp_path / "chat.jsonl")]) == 2
    assert "the model has no chat template; give --prompt-template FILE" in capfd.readouterr().err


def section(guide, heading):
    """The code of a section, by its language."""
    text = (
        (GUIDES / guide).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    )
    return dict(re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL))


def test_what_the_guides_show_runs(call, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shown = section("chat.md", "OpenAI's batch files")
    (tmp_path / "requests.jsonl").write_text(shown["json"])
    for words in map(shlex.split, shown["sh"].splitlines()):
        assert words[:2] == ["marsinfer", "batch"]
        assert call(*words[2:]) == 0
    assert [row["id"] for row in read(tmp_path / "answers.parquet")] == ["lease-1", "lease-2"]
    capfd.readouterr()
    exec(shown["python"], {})
    printed = capfd.readouterr().out
    assert [name in printed for name in ("lease-1", "lease-2")] == [True, True]


def test_a_table_has_the_usual_columns_and_the_same_answers(call, source, tmp_path):
    assert call(source, tmp_path / "out.parquet") == 0
    assert call(source, tmp_path / "out.jsonl") == 0
    rows = {row["row"]: row for row in read(tmp_path / "out.parquet")}
    assert len(rows) == 13
    ours = {row["id"]: row for row in rows.values() if row["status"] == "ok"}
    answers = completions(tmp_path / "out.jsonl")
    assert {name: (row["answer"], row["finish_reason"], row["new_tokens"]) for name, row in ours.items()} == {
        name: told(each) for name, each in answers.items()
    }
    lengths = {"context_length_exceeded": "over_long"}
    failed = {row["id"]: row["error_type"] for row in rows.values() if row["status"] == "error"}
    assert failed == {name: lengths.get(kind, kind) for name, kind in KINDS.items()}
    assert ours["r0"]["question"] == "How many fish?"
    assert not (tmp_path / "out.errors.parquet").exists()


def test_a_request_is_answered_the_same_alone(call, source, tmp_path):
    """Whatever the others ask for, and wherever it stands, under a seed of its own."""
    assert call(source, tmp_path / "out.jsonl") == 0
    together = completions(tmp_path / "out.jsonl")
    for name in ("r1", "r2"):
        (alone,) = [row for row in read(source) if row.get("custom_id") == name]
        write(tmp_path / "one.jsonl", [alone])
        assert call(tmp_path / "one.jsonl", tmp_path / "alone.jsonl", "--overwrite") == 0
        assert told(completions(tmp_path / "alone.jsonl")[name]) == told(together[name])


def test_what_a_request_leaves_open_the_flags_say(call, tmp_path):
    source = write(tmp_path / "in.jsonl", [line(0, body(max_tokens=None)), line(1)])
    assert call(source, tmp_path / "out.jsonl", "--max-new-tokens", 7) == 0
    assert [each.usage.completion_tokens for each in completions(tmp_path / "out.jsonl").values()] == [7, 4]
    assert call(source, tmp_path / "drawn.jsonl", "--temperature", 1, "--seed", 5) == 0
    greedy, drawn = (completions(tmp_path / name)["r1"] for name in ("out.jsonl", "drawn.jsonl"))
    assert told(greedy) != told(drawn)


def test_plain_rows_first_make_a_plain_run(call, tmp_path):
    rows = [{"text": "one fish", "question": "how many?"}, line(1)]
    source = write(tmp_path / "in.jsonl", rows)
    assert call(source, tmp_path / "out.jsonl", "--max-new-tokens", 2) == 0
    first, second = read(tmp_path / "out.jsonl")
    assert (first["status"], second["error_type"]) == ("ok", "missing_text")
    assert not (tmp_path / "out.errors.jsonl").exists()


def test_a_changed_request_is_answered_anew_and_no_other(call, source, tmp_path, capfd):
    output = tmp_path / "out.jsonl"
    assert call(source, output) == 0
    rows = read(source)
    rows[1]["body"]["max_completion_tokens"] = 6
    rows[3]["body"].pop("tools")
    write(source, rows)
    capfd.readouterr()
    assert call(source, output, "--resume", "--json", "--quiet") == 0
    answers = completions(output)
    assert list(answers) == ["r0", "r1", "r2", "r3", "r12"]
    assert answers["r1"].usage.completion_tokens == 6
    assert {row["custom_id"] for row in read(tmp_path / "out.errors.jsonl")} == KINDS.keys() - {"r3"}
    # those two, and the second of the two that have one id
    assert json.loads(capfd.readouterr().out)["documents"] == 3


@pytest.mark.slow
def test_a_killed_run_is_resumed(call, model_folder, tmp_path):
    rows = [line(n, body(f"fish {n} " * (5 + n % 7), max_tokens=2 + n % 5)) for n in range(20)]
    rows[4]["body"]["n"] = 2
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = [
        "batch",
        "--model",
        str(model_folder),
        "--pack-tokens",
        "1",
        "--resume",
        str(source),
        str(output),
    ]
    with held_run(words, tmp_path / "printed") as process:
        process.signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()
    assert call(source, output, "--pack-tokens", 1, "--resume") == 0
    assert call(source, tmp_path / "whole.jsonl", "--pack-tokens", 1) == 0
    resumed, whole = completions(output), completions(tmp_path / "whole.jsonl")
    assert {name: told(each) for name, each in resumed.items()} == {
        name: told(each) for name, each in whole.items()
    }
    assert [row["custom_id"] for row in read(tmp_path / "out.errors.jsonl")] == ["r4"]
    assert len(resumed) == 19 > SAVED


def test_on_standard_output_all_lines_come_in_one_stream(call, source, tmp_path, capfd):
    assert call(source, "-", "--columns", "answer") == 0
    rows = [json.loads(text) for text in capfd.readouterr().out.splitlines()]
    assert call(source, tmp_path / "out.jsonl", "--columns", "answer") == 0
    expected = [*read(tmp_path / "out.jsonl"), *read(tmp_path / "out.errors.jsonl")]
    for row in (*rows, *expected):
        row["response"]["body"].pop("created", None)  # which tells when a run began
    by_row = {row["marsinfer"]["row"]: row for row in rows}
    assert [by_row[row["marsinfer"]["row"]] for row in expected] == expected
    assert len(rows) == len(expected) == 13


def test_the_output_is_reported_on_and_not_read_as_input(call, source, tmp_path, capfd):
    folder = tmp_path / "batch"
    folder.mkdir()
    source = source.rename(folder / "in.jsonl")
    assert call(source, folder / "out.jsonl") == 0
    capfd.readouterr()
    assert run(["report", str(folder / "out.jsonl")]) == 0
    printed = capfd.readouterr().out
    assert "4 (30.8%)" in printed
    assert "row 8, r8: in.jsonl line 9: 'body' has an unknown field 'best_of'" in printed
    assert call(folder, tmp_path / "again.jsonl") == 0
    assert len(read(tmp_path / "again.jsonl")) == 4
    assert len(read(tmp_path / "again.errors.jsonl")) == 9


def test_shards_are_merged_in_the_same_form(call, source, tmp_path):
    write(source, [row for number, row in enumerate(read(source)) if number != 4])  # whose id is another's
    shards = [tmp_path / f"{number}.jsonl" for number in (1, 2)]
    for number, shard in enumerate(shards, start=1):
        assert call(source, shard, "--shard", f"{number}/2") == 0
    assert run(["merge", str(tmp_path / "all.jsonl"), *map(str, shards)]) == 0
    assert call(source, tmp_path / "out.jsonl") == 0
    failed = [
        [row["custom_id"] for row in read(tmp_path / f"{name}.errors.jsonl")] for name in ("all", "out")
    ]
    assert failed[0] == failed[1]
    assert len(failed[0]) == 8
    merged, whole = completions(tmp_path / "all.jsonl"), completions(tmp_path / "out.jsonl")
    assert [(name, told(each)) for name, each in merged.items()] == [
        (name, told(each)) for name, each in whole.items()
    ]


def test_a_file_that_no_run_wrote_is_not_replaced(call, source, tmp_path, capfd):
    (tmp_path / "out.errors.jsonl").write_text("mine\n")
    assert call(source, tmp_path / "out.jsonl") == 2
    assert "out.errors.jsonl, which is to hold the rows without an answer" in capfd.readouterr().err
    assert (tmp_path / "out.errors.jsonl").read_text() == "mine\n"


def test_a_dry_run_counts_what_is_refused(call, source, tmp_path, capfd):
    assert call(source, tmp_path / "out.jsonl", "--dry-run", "--json") == 0
    report = json.loads(capfd.readouterr().out)
    kinds = {kind: each["rows"] for kind, each in report["error_types"].items()}
    assert (kinds["bad_request"], kinds["unsupported"], kinds["over_long"]) == (3, 2, 1)
    assert call(source, tmp_path / "out.jsonl", "--dry-run") == 0
    assert "if every answer has 7 tokens" in capfd.readouterr().out  # of 4, 3, 9 and 12


@pytest.mark.slow
def test_both_files_are_objects_of_a_bucket(call, source, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    remote, output = put(f"{bucket}/in.jsonl", source.read_bytes()), f"{bucket}/night/out.jsonl"
    assert call(remote, output) == 0
    names = ["in.jsonl", "night/out.errors.jsonl", "night/out.jsonl", "night/out.jsonl.run.json"]
    assert objects(bucket) == names
    rows = read(source)
    rows[3]["body"].pop("tools")
    put(f"{bucket}/in.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    assert call(remote, output, "--resume") == 0
    assert held(f"{bucket}/night/out.jsonl") == ["r0", "r1", "r2", "r3", "r12"]
    assert sorted(held(f"{bucket}/night/out.errors.jsonl")) == sorted(KINDS.keys() - {"r3"})
    answered = [row for row in rows if row.get("custom_id") in ("r1", "r2", "r3")]
    put(f"{bucket}/in.jsonl", "".join(json.dumps(row) + "\n" for row in answered).encode())
    assert call(remote, output, "--resume", "--drop-missing") == 0
    assert held(f"{bucket}/night/out.jsonl") == ["r1", "r2", "r3"]
    assert [name for name in objects(bucket) if "errors" in name] == []


def held(url):
    """The requests that an object has lines of."""
    return [json.loads(each)["custom_id"] for each in place_of(url).read_bytes().splitlines()]


def test_rows_of_a_table_beside_requests_are_refused(call, source, tmp_path, capfd):
    write(tmp_path / "more.parquet", [{"text": "one fish"}])
    assert call(source, tmp_path / "more.parquet", tmp_path / "out.jsonl") == 2
    assert "more.parquet: requests of OpenAI's Batch API are JSON lines" in capfd.readouterr().err
