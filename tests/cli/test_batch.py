"""`marsinfer batch` as a user runs it: files in, files out, exit codes, and messages word for word."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from marsinfer_cli.app import run

ROWS = [
    {"doc": "a", "body": "one fish two fish " * 12, "ask": "how many fish?", "year": 1960},
    {"doc": "b", "body": "red fish " * 40, "ask": "what colour?", "year": 1961},
    {"doc": "c", "body": "blue fish", "ask": "what colour?", "year": None},
]


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.fixture
def batch(model_folder, monkeypatch):
    monkeypatch.setenv("MARSINFER_METHOD", "dense")

    def call(*arguments, model=model_folder):
        flags = ["--model", str(model), "--text-column", "body", "--max-new-tokens", "6"]
        return run(["batch", *flags, *map(str, arguments)])

    return call


PRUNED = ["--method", "marsinfer"]
COLUMNS = ["--question-column", "ask", "--id-column", "doc"]


def test_every_row_gets_an_answer_with_its_statistics(batch, parquet, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    flags = [
        "--method",
        "marsinfer",
        "--set",
        "start_layer=1",
        "--set",
        "window=8",
        "--set",
        "prefix=8",
        "--set",
        "eta=0.5",
    ]
    assert batch(parquet, out, *COLUMNS, *flags) == 0
    rows = pq.read_table(out).to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["row"] for row in rows] == [0, 1, 2]
    for row, source in zip(rows, ROWS, strict=True):
        assert row["status"] == "ok"
        assert isinstance(row["answer"], str)
        assert row["document_tokens"] == len(source["body"])  # one token a byte
        assert row["truncated_tokens"] == 0
        assert 1 <= row["new_tokens"] <= 6
        assert row["ttft_ms"] >= row["prefill_ms"] > 0
        assert (row["pack_documents"], row["method"], row["year"]) == (3, "marsinfer", source["year"])
        assert row["kept_tokens"] == [row["prompt_tokens"]] * 4
        assert row["ffn_tokens"][0] == row["prompt_tokens"]
        assert row["attention_ratio"] == 1
        assert row["ffn_tokens"][-1] == 1
        of_dense = 3 * row["prompt_tokens"] + 1
        assert row["ffn_ratio"] == pytest.approx(sum(row["ffn_tokens"]) / of_dense)
        assert row["kv_bytes"] == 4 * row["prompt_tokens"] * 2 * 2 * 16 * 4
    assert rows[0]["ffn_ratio"] < 1
    assert rows[0]["flops_ratio"] < 1
    assert "FFN work skipped" in capfd.readouterr().err


def test_the_outputs_metadata_tells_how_it_was_made(batch, parquet, tmp_path, model_folder):
    out = tmp_path / "out.arrow"
    flags = [
        "--method",
        "marsinfer",
        "--set",
        "start_layer=1",
        "--set",
        "eta=0.9",
        "--sparse-attention",
        "0.8",
        "--quiet",
    ]
    assert batch(parquet, out, *COLUMNS, *flags) == 0
    with pa.ipc.open_file(out) as reader:
        metadata = json.loads(reader.schema.metadata[b"marsinfer"])
    decides = metadata["settings_that_decide"]
    assert decides["method"]["settings"]["eta"] == 0.9
    assert decides["method"]["settings"]["sparse_attention"] == 0.8
    assert metadata["config"]["question_column"] == "ask"
    assert metadata["attention"]["backend"] == "sdpa"
    assert metadata["attention"]["refused"]["fa3"] == "needs a GPU"
    assert metadata["model"] == str(model_folder)
    assert decides["model"]["fingerprint"].startswith("content:")
    assert len(decides["template_sha256"]) == 64
    assert metadata["versions"]["torch"]


def test_packing_changes_no_answer(batch, parquet, tmp_path):
    together, alone = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert batch(parquet, together, *COLUMNS) == 0
    assert batch(parquet, alone, *COLUMNS, "--pack-tokens", "1") == 0
    first, second = ([json.loads(line) for line in path.open()] for path in (together, alone))
    assert [row["answer"] for row in first] == [row["answer"] for row in second]
    assert [row["pack_documents"] for row in first] == [3, 3, 3]
    assert [row["pack_documents"] for row in second] == [1, 1, 1]


def test_completion_order_is_longest_first(batch, parquet, tmp_path):
    out = tmp_path / "out.jsonl"
    assert batch(parquet, out, *COLUMNS, "--order", "completion", "--pack-tokens", "1") == 0
    assert [json.loads(line)["id"] for line in out.open()] == ["b", "a", "c"]


def test_a_bad_row_is_a_row_and_the_run_goes_on(batch, tmp_path, capfd):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    lines = [json.dumps(row) for row in ROWS]
    lines[1:1] = ["{broken", '{"body": 7, "ask": "?"}', '{"body": "", "ask": "?"}', "[1]"]
    lines.append(json.dumps({"doc": "long", "body": "x" * 2000, "ask": "?"}))
    source.write_text("\n".join(lines) + "\n")
    assert batch(source, out, "--question-column", "ask", "--fail-on-error", "--json") == 3
    rows = pq.read_table(out).to_pylist()
    assert [row["status"] for row in rows] == ["ok", *["error"] * 4, "ok", "ok", "error"]
    kinds = [row["error_type"] for row in rows if row["status"] == "error"]
    assert kinds == ["bad_json", "bad_text_type", "empty_document", "not_an_object", "over_long"]
    assert all("in.jsonl line" in row["error_message"] for row in rows if row["status"] == "error")
    summary = json.loads(capfd.readouterr().out)
    assert (summary["documents"], summary["ok"], summary["errors"]) == (8, 3, 5)
    assert summary["error_types"]["over_long"] == 1


@pytest.mark.parametrize("policy", ["truncate-left", "truncate-right", "truncate-middle"])
def test_an_over_long_document_is_cut_to_the_context(batch, tmp_path, policy):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"body": "x" * 2000}) + "\n")
    assert batch(source, out, "--question", "what?", "--on-overlong", policy) == 0
    row = json.loads(out.read_text())
    assert row["prompt_tokens"] == 1024 - 6
    assert row["truncated_tokens"] == 2000 - row["document_tokens"] > 900


def test_over_long_rows_can_be_skipped(batch, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"body": "x" * 2000}) + "\n" + json.dumps({"body": "short"}) + "\n")
    flags = ["--question", "what?", "--on-overlong", "skip", "--fail-on-error"]
    assert batch(source, out, *flags) == 0
    row = json.loads(out.read_text().splitlines()[0])
    assert (row["status"], row["error_type"], row["answer"]) == ("skipped", "over_long", None)


def test_sampling_is_repeatable_and_stop_texts_end_an_answer(batch, parquet, tmp_path):
    def answers(name, *flags):
        out = tmp_path / f"{name}.jsonl"
        assert batch(parquet, out, *COLUMNS, "--temperature", "2", *flags) == 0
        return [json.loads(line)["answer"] for line in out.open()]

    first = answers("first", "--seed", "1")
    assert answers("again", "--seed", "1") == first
    assert answers("packed", "--seed", "1", "--pack-tokens", "1") == first
    assert answers("other", "--seed", "2") != first
    letter = next(answer for answer in first if len(answer) > 2)[1]
    stopped = answers("stopped", "--seed", "1", "--stop", letter)
    assert stopped == [answer.split(letter)[0] for answer in first]


def test_text_files_of_a_folder(batch, tmp_path):
    folder, out = tmp_path / "docs", tmp_path / "out.jsonl"
    folder.mkdir()
    (folder / "b.md").write_text("beta " * 9)
    (folder / "a.txt").write_text("alpha " * 9)
    assert batch(folder, out, "--question", "what?") == 0
    assert [json.loads(line)["id"] for line in out.open()] == ["a.txt", "b.md"]


def test_a_column_of_our_own_name_gets_a_suffix_and_a_note(batch, tmp_path, capfd):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"body": ["fish " * 9], "answer": ["42"]}), source)
    assert batch(source, out, "--question", "what?") == 0
    assert pq.read_table(out).column("answer_input").to_pylist() == ["42"]
    assert "marsinfer: note: " in capfd.readouterr().err


@pytest.fixture
def refused(batch, parquet, tmp_path, capfd):
    """A run that must end with 2 and one line on stderr, and leave no output."""

    def call(*flags, source=parquet, out=tmp_path / "out.parquet", code=2, **kwargs):
        before = out.read_bytes() if out.is_file() else None
        assert batch(source, out, *flags, **kwargs) == code
        printed = capfd.readouterr().err
        assert len(printed.splitlines()) == 1, printed
        assert (out.read_bytes() if out.is_file() else None) == before
        return printed.removeprefix("marsinfer: error: ").rstrip()

    return call


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--method", "marsinfr"],
            "unknown method 'marsinfr' (did you mean 'marsinfer'?); methods: cascade, ",
        ),
        (["--set", "eta"], "--set 'eta': write it as NAME=VALUE, for example --set eta=0.95"),
        ([*PRUNED, "--set", "eta=-1"], "eta=-1.0 is out of range: it must be between 0 and 1"),
        ([*PRUNED, "--set", "eta=1.5"], "eta=1.5 is out of range: it must be between 0 and 1"),
        ([*PRUNED, "--set", "start_layer=4"], "start_layer=4, and the model has layers 0 to 3"),
        (
            ["--method", "auto", "--set", "eta=0.9"],
            "--set gives parameters of a method: name it with --method",
        ),
        ([*PRUNED, "--set", "etta=1"], "method marsinfer has no parameter 'etta' (did you mean 'eta'?)"),
        (
            [*PRUNED, "--set", "start_layer=1", "--set", "eta=1,1"],
            "eta has 2 values, and the model has 4 layers: give one value, or one a layer",
        ),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be a whole number of at least 1"),
        (["--top-p", "0"], "--top-p 0.0: must be above 0 and at most 1"),
        (["--temperature", "nan"], "--temperature nan: must be a number, and at most "),
        (["--pack-tokens", "lots"], "--pack-tokens 'lots': give a whole number such as 8192, 32k or 1m"),
        (["--order", "random"], "--order 'random': choose from input, completion"),
        (["--device", "tpu"], "unknown device 'tpu': give auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:9"], "device 'cuda:9' is not there: torch sees 0 GPUs"),
        (["--attention", "fa3"], "no attention backend works on cpu with torch.float32: fa3: needs a GPU"),
        (["--sparse-attention", "1.5"], "--sparse-attention 1.5: must be between 0 and 1"),
        (
            ["--sparse-attention", "0.9", "--set", "sparse_attention=0.8"],
            "--sparse-attention and --set sparse_attention=MASS exclude each other: they are one setting",
        ),
        (["--question", "x"], "--question and --question-column exclude each other"),
        (["--prompt-template", "gone.jinja"], "--prompt-template gone.jinja cannot be read: "),
    ],
)
def test_a_flag_that_cannot_work(refused, flags, message):
    assert refused(*COLUMNS, *flags).startswith(message)


def test_a_missing_column_names_those_there_are(refused):
    message = refused("--question-column", "query")
    assert message.startswith("in.parquet has no column 'query'; it has: doc, body, ask, year")


def test_a_missing_input(refused, tmp_path):
    assert "nowhere.jsonl" in refused("--question", "x", source=tmp_path / "nowhere.jsonl")


def test_a_parquet_file_cut_short(refused, parquet):
    parquet.write_bytes(parquet.read_bytes()[:-100])
    assert "in.parquet" in refused(*COLUMNS)


def test_an_output_that_exists_needs_overwrite(refused, batch, parquet, tmp_path, capfd):
    out = tmp_path / "out.parquet"
    out.write_text("precious")
    assert "exists, and marsinfer did not write it" in refused(*COLUMNS, "--overwrite")
    out.unlink()
    assert batch(parquet, out, *COLUMNS) == 0
    capfd.readouterr()
    assert "exists; --overwrite" in refused(*COLUMNS)
    assert batch(parquet, out, *COLUMNS, "--overwrite") == 0
    assert pq.read_table(out).num_rows == 3


def test_an_output_that_is_the_input(refused, parquet):
    refused(*COLUMNS, "--overwrite", out=parquet)
    assert pq.read_table(parquet).num_rows == 3


def test_an_output_in_a_folder_that_is_not_there(refused, tmp_path):
    assert "gone" in refused(*COLUMNS, out=tmp_path / "gone" / "out.parquet")


def test_an_unknown_model(refused):
    message = refused(*COLUMNS, model="smollm3")
    assert message == (
        "unknown model 'smollm3': it is no folder, no .gguf file, no hub id (owner/name) "
        "and not the embedded smollm2-135m"
    )


def test_usage_errors_are_one_line(capfd):
    assert run(["batch", "--no-such-flag"]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("marsinfer: error: ")
    assert len(printed.splitlines()) == 1


def test_an_interrupt_says_so_and_leaves_no_output(batch, parquet, tmp_path, monkeypatch, capfd):
    from pipeline.engines.local import LocalEngine

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalEngine, "advance", interrupted)
    assert batch(parquet, tmp_path / "out.parquet", *COLUMNS) == 130
    assert capfd.readouterr().err == "marsinfer: error: interrupted; no row of this run was answered\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet"]


@pytest.mark.parametrize(
    ("constant", "seconds", "note"),
    [
        ("pipeline.engines.warm_up.WORTH_A_NOTE_S", 0.0, r"warmed up in \d+\.\d s"),
        (
            "pipeline.engines.warm_up.LONGEST_WARM_UP_S",
            0.0,
            "the warm-up was given up after 0 s: the TTFT of the first packs may hold the rest of it",
        ),
    ],
)
def test_the_warm_up_is_told(batch, parquet, tmp_path, monkeypatch, capfd, constant, seconds, note):
    monkeypatch.setattr(constant, seconds)
    assert batch(parquet, tmp_path / "out.parquet", *COLUMNS, "--quiet", "--json") == 0
    printed = capfd.readouterr()
    assert re.fullmatch(f"marsinfer: note: {note}\n", printed.err)
    summary = json.loads(printed.out)
    assert summary["warm_up_s"] > 0
    assert summary["packs"] == 1
    assert summary["load_s"] > 0
    parts = ("load_s", "warm_up_s", "prefill_s", "decode_s")
    assert sum(summary[part] for part in parts) < summary["seconds"]


def test_the_next_window_is_read_while_one_is_answered(model_folder, tmp_path, monkeypatch):
    from pipeline import run as pipeline_batch
    from pipeline.engines.local import LocalEngine

    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"fish {n:03}"}) + "\n" for n in range(40)))
    second_was_read, cut, advance = threading.Event(), pipeline_batch.windows, LocalEngine.advance
    read_in_time = []

    def windows(items, size):
        for number, window in enumerate(cut(items, size, documents=10)):
            if number == 1:
                second_was_read.set()
            yield window

    def advance_once_it_was(self):
        read_in_time.append(second_was_read.wait(300))
        return advance(self)

    monkeypatch.setattr(pipeline_batch, "windows", windows)
    monkeypatch.setattr(LocalEngine, "advance", advance_once_it_was)
    expected = []
    summary = pipeline_batch.run_batch(
        str(source),
        str(tmp_path / "out.jsonl"),
        model=str(model_folder),
        question="what?",
        max_new_tokens=2,
        progress=lambda summary: expected.append(summary.expected_rows),
    )
    assert summary.documents == 40
    assert all(read_in_time)
    assert expected[0] == pytest.approx(40, abs=4)  # from what was read of a window, not ahead of it


@pytest.mark.parametrize("arguments", [[], ["bench"], ["batch", "--help"]])
def test_help_is_printed_on_stdout(capfd, arguments):
    assert run(arguments) == 0
    printed = capfd.readouterr()
    assert "Usage: marsinfer" in printed.out
    assert printed.err == ""


def test_an_output_must_be_named(capfd):
    assert run(["batch", "in.parquet"]) == 2
    assert "Missing argument" in capfd.readouterr().err


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from marsinfer_cli.app import run; code = run(['batch', '--help']); "
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules); "
        "sys.exit(code or bool(heavy))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
    )
