"""What becomes of a run that is stopped: signals, too many errors, a second run, and going on."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import SAVED, Forked, held_run, load_for_ever

from marsinfer_cli.app import run
from pipeline import load_model, run_batch
from pipeline.errors import KEPT, Interrupted
from pipeline.inputs.source import Source
from pipeline.model.loading import UnloadedModel
from pipeline.outputs import parts

FLAGS = ["--question", "what?", "--id-column", "id", "--max-new-tokens", "3", "--pack-tokens", "1"]
PRUNED = ["--method", "marsinfer", "--set", "start_layer=1"]


@pytest.fixture
def batch(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MARSINFER_METHOD", "dense")

    def call(source, *flags, out="out.parquet"):
        words = [
            "batch",
            "--model",
            str(model_folder),
            *FLAGS,
            *map(str, flags),
            str(source),
            str(tmp_path / out),
        ]
        return run(words)

    return call


def write_rows(path, texts):
    lines = [json.dumps({"id": f"doc-{n}", "text": text}) for n, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def answers(tmp_path):
    return {row["id"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}


@pytest.fixture
def fish(tmp_path):
    return write_rows(tmp_path / "in.jsonl", [f"fish {n} " * 9 for n in range(6)])


@pytest.fixture
def no_weights(monkeypatch):
    def load(self):
        raise AssertionError("the weights were loaded")

    return lambda: monkeypatch.setattr(UnloadedModel, "load", load)


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_resume_starts_afresh_and_then_leaves_the_output_as_it_is(
    batch, fish, tmp_path, capfd, no_weights, name
):
    out = tmp_path / name
    assert batch(fish, "--resume", out=name) == 0
    before, files = (out.read_bytes(), out.stat().st_mtime_ns), sorted(os.listdir(tmp_path))
    capfd.readouterr()
    no_weights()
    assert batch(fish, "--resume", "--quiet", out=name) == 0
    assert capfd.readouterr().err == (
        "marsinfer: note: resuming: 6 rows are done\n"
        f"marsinfer: note: nothing new: every row was done; {out} stays as it is\n"
    )
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    assert sorted(os.listdir(tmp_path)) == files


def test_rows_that_left_the_input_leave_the_output_without_weights(batch, fish, tmp_path, capfd, no_weights):
    assert batch(fish) == 0
    write_rows(fish, [f"fish {n} " * 9 for n in range(4)])
    capfd.readouterr()
    no_weights()
    assert batch(fish, "--resume", "--quiet") == 0
    assert list(answers(tmp_path)) == [f"doc-{n}" for n in range(4)]
    assert capfd.readouterr().err.endswith("marsinfer: note: nothing new: every row was done\n")


def test_rows_that_all_fail_need_no_weights(batch, tmp_path, no_weights):
    no_weights()
    assert batch(write_rows(tmp_path / "in.jsonl", ["x" * 3000] * 3)) == 3
    assert {row["error_type"] for row in answers(tmp_path).values()} == {"over_long"}


def test_weights_that_cannot_be_read_leave_nothing_behind(batch, fish, tmp_path, model_folder, capfd):
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_text("no weights")
    files = sorted(os.listdir(tmp_path))
    assert batch(fish, "--model", broken) == 2
    assert capfd.readouterr().err.startswith(f"marsinfer: error: model '{broken}' cannot be loaded: ")
    assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "unknown model 'nowhere': "),
        (["--model", "./gone"], "unknown model './gone': "),
        (["--attention", "fa3"], "no attention backend works on cpu"),
        ([*PRUNED, "--set", "eta=1,1"], "eta has 2 values, and the model has 4 layers"),
    ],
)
def test_what_cannot_work_is_told_before_the_input_is_read(
    batch, fish, tmp_path, capfd, monkeypatch, flags, message
):
    def read(self):
        raise AssertionError("the input was read")

    monkeypatch.setattr(Source, "__iter__", read)
    assert batch(fish, *flags) == 2
    assert capfd.readouterr().err.startswith(f"marsinfer: error: {message}")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_loaded_model_goes_on_where_its_name_began(model_folder, fish, tmp_path):
    settings = {"question": "what?", "id_column": "id", "max_new_tokens": 3, "resume": True}
    out = str(tmp_path / "out.jsonl")
    assert run_batch(str(fish), out, model=str(model_folder), **settings).documents == 6
    write_rows(fish, [f"fish {n} " * 9 for n in range(8)])
    model = load_model(str(model_folder))
    assert run_batch(str(fish), out, model=model, **settings).documents == 2
    assert run_batch(str(fish), out, model=model, **settings).documents == 0


def test_the_rows_expected_are_those_that_are_not_done(model_folder, fish, tmp_path):
    settings = {"question": "what?", "id_column": "id", "max_new_tokens": 3, "pack_tokens": 1}
    settings |= {"model": load_model(str(model_folder)), "resume": True}
    out = str(tmp_path / "out.parquet")
    run_batch(str(fish), out, **settings)
    write_rows(fish, [f"fish {n} " * 9 for n in range(10)])
    told = []

    def progress(summary):
        told.append((summary.documents, summary.expected_rows))

    run_batch(str(fish), out, progress=progress, **settings)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_while_the_output_is_written_ends_the_run(
    batch, fish, tmp_path, capfd, monkeypatch, number, code
):
    def read_chunk(path, offset):
        os.kill(os.getpid(), number)
        return real(path, offset)

    real = parts.read_chunk
    with monkeypatch.context() as patch:
        patch.setattr(parts, "read_chunk", read_chunk)
        assert batch(fish) == code
    name = signal.Signals(number).name
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"marsinfer: error: stopped by {name}; finished rows are kept, and --resume continues"
    )
    assert sorted(os.listdir(tmp_path)) == [".out.parquet.journal", "in.jsonl"]
    assert batch(fish, "--resume", "--json", "--quiet") == 0
    assert json.loads(capfd.readouterr().out)["documents"] == 0
    assert len(answers(tmp_path)) == 6


def test_new_rows_continue_from_the_published_output(batch, fish, tmp_path, capfd):
    assert batch(fish) == 0
    before = answers(tmp_path)
    write_rows(fish, [f"fish {n} " * 9 for n in range(8)])
    assert batch(fish, "--resume", "--json", "--quiet") == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["documents"] == 2
    after = answers(tmp_path)
    assert list(after) == [f"doc-{n}" for n in range(8)]
    assert all(after[id]["ttft_ms"] == row["ttft_ms"] for id, row in before.items())  # not run again


def test_a_row_that_changed_is_answered_again(batch, fish, tmp_path):
    assert batch(fish) == 0
    before = answers(tmp_path)
    write_rows(fish, ["bird " * 9, *[f"fish {n} " * 9 for n in range(1, 6)]])
    assert batch(fish, "--resume") == 0
    after = answers(tmp_path)
    changed = [id for id in after if after[id]["row_hash"] != before[id]["row_hash"]]
    assert changed == ["doc-0"]
    assert after["doc-0"]["document_tokens"] == 45


def test_a_changed_setting_is_refused_by_name(batch, fish, capfd):
    assert batch(fish, *PRUNED) == 0
    capfd.readouterr()
    assert batch(fish, "--resume", *PRUNED, "--set", "eta=0.5", "--max-new-tokens", "9") == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert "max_new_tokens" in message
    assert "method.settings.eta" in message
    assert "--overwrite starts over" in message


def test_errors_are_kept_until_they_are_retried(batch, tmp_path, capfd):
    source = write_rows(tmp_path / "in.jsonl", ["fish " * 9, "x" * 3000, "bird " * 9])
    assert batch(source) == 0
    assert answers(tmp_path)["doc-1"]["status"] == "error"
    assert batch(source, "--resume", "--json", "--quiet") == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["documents"] == 0
    assert batch(source, "--resume", "--retry-errors", "--json", "--quiet") == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["documents"] == 1
    assert [row["status"] for row in answers(tmp_path).values()] == ["ok", "error", "ok"]


def test_an_error_tells_what_ails_the_row_now_and_where(batch, tmp_path, no_weights):
    source = write_rows(tmp_path / "in.jsonl", ["fish " * 9, 7])
    assert batch(source) == 0
    assert answers(tmp_path)["doc-1"]["error_message"].startswith("in.jsonl line 2: ")
    good, bad = source.read_text().splitlines()
    source.write_text(f"{bad.replace('7', '[8]')}\n{good}\n")
    no_weights()
    assert batch(source, "--resume") == 0
    told = answers(tmp_path)["doc-1"]["error_message"]
    assert told.startswith("in.jsonl line 1: ")
    assert "an array" in told


def test_the_second_row_of_an_id_is_an_error_that_names_both(batch, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "a", "text": "one fish"}\n{"id": "a", "text": "two fish"}\n')
    assert batch(source) == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["id"], row["row"], row["status"]) for row in rows] == [("a", 0, "ok"), ("a", 1, "error")]
    assert rows[1]["error_type"] == "duplicate_id"
    assert "in.jsonl line 2" in rows[1]["error_message"]
    assert "row 0" in rows[1]["error_message"]


@pytest.mark.slow
@pytest.mark.parametrize(("bound", "code"), [("2", 4), ("3", 0), ("40%", 4), ("60%", 0)])
def test_a_run_that_is_clearly_broken_stops_and_can_go_on(batch, tmp_path, capfd, bound, code):
    texts = ["x" * 3000 if (n % 2 and n < 6) or n >= 26 else f"fish {n}" for n in range(40)]
    texts = texts if "%" in bound else texts[:26]
    source = write_rows(tmp_path / "in.jsonl", texts)
    assert batch(source, "--max-errors", bound) == code
    assert (tmp_path / "out.parquet").exists() == (code == 0)
    if code:
        assert f"more than --max-errors {bound} allows" in capfd.readouterr().err
        assert batch(source, "--resume") == 0
        assert len(answers(tmp_path)) == len(texts)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_good_order_and_it_can_go_on(model_folder, tmp_path, capfd, number, code):
    source = write_rows(tmp_path / "in.jsonl", [f"fish {n} " * 30 for n in range(24)])
    files = [str(source), str(tmp_path / "out.parquet")]
    words = ["batch", "--model", str(model_folder), *FLAGS, "--resume", *files]
    with held_run(words, tmp_path / "printed") as process:
        process.signal(number)
        assert process.wait(300) == code
    assert "--resume" in process.printed().splitlines()[-1]
    assert not (tmp_path / "out.parquet").exists()
    assert run([*words, "--json"]) == 0
    assert 0 < json.loads(capfd.readouterr().out)["documents"] <= 24 - SAVED
    assert list(answers(tmp_path)) == [f"doc-{n}" for n in range(24)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_model_loads_ends_the_run_at_once(fish, model_folder, tmp_path, number, code):
    flags = ["--model", str(model_folder), "--method", "dense", *FLAGS, "--quiet"]
    words = ["batch", *flags, str(fish), str(tmp_path / "out.parquet")]
    process = Forked(words, tmp_path / "printed", load_for_ever)
    assert process.heard() == "loading"
    process.signal(number)
    message = "marsinfer: error: interrupted; no row of this run was answered\n"
    assert (process.wait(300), process.printed()) == (code, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "printed"]


@pytest.mark.parametrize(("finished", "resume"), [(0, False), (0, True), (1, False)])
def test_an_interrupt_promises_no_rows_that_are_not_there(model_folder, fish, tmp_path, finished, resume):
    seen = []

    def check():
        if len(seen) == finished:
            raise Interrupted(f"stopped by SIGINT; {KEPT}", 130)

    settings = {"question": "what?", "id_column": "id", "max_new_tokens": 1, "pack_tokens": 1}
    with pytest.raises(Interrupted) as stopped:
        run_batch(
            fish,
            tmp_path / "out.parquet",
            model=str(model_folder),
            check=check,
            progress=seen.append,
            resume=resume,
            **settings,
        )
    what = KEPT if finished else "no row was finished, and there is nothing to resume"
    assert (str(stopped.value), stopped.value.exit_code) == (f"stopped by SIGINT; {what}", 130)
    assert (tmp_path / ".out.parquet.journal").exists() == bool(finished)


def test_a_run_without_a_single_answer_ends_with_3_and_so_does_its_resumption(batch, tmp_path, capfd):
    source = write_rows(tmp_path / "in.jsonl", ["", "x" * 3000, ""])
    assert batch(source, "--json") == 3
    printed = capfd.readouterr()
    why = "none of 3 rows was answered; empty_document"
    first = "in.jsonl line 1: 'text' is empty"
    assert printed.err.splitlines()[-1] == f"marsinfer: error: {why} (2 rows): {first}"
    assert json.loads(printed.out)["in_output"] == {"ok": 0, "error": 3, "skipped": 0}
    assert len(answers(tmp_path)) == 3  # published even so
    assert batch(source, "--resume", "--quiet") == 3
    assert capfd.readouterr().err.endswith(f"marsinfer: error: {why}: {first}\n")
    write_rows(source, ["", "x" * 3000, "", "fish"])
    assert batch(source, "--resume") == 0  # one row of the output is answered
    assert batch(source, "--resume") == 0  # by an earlier run
    write_rows(source, ["", "x" * 3000, ""])
    assert batch(source, "--resume") == 3  # the answered row has left


@pytest.mark.parametrize("unreadable", [0, 300])
def test_an_input_without_the_column_of_the_text_is_refused_and_leaves_nothing(
    batch, tmp_path, capfd, no_weights, unreadable
):
    no_weights()
    rows = [json.dumps({"id": str(n), "title": "fish"}) for n in range(300)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(["{broken"] * unreadable + rows))
    for flags in ([], ["--dry-run"], ["--resume"]):
        assert batch(source, *flags, "--quiet") == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        read = 512 if unreadable else 256
        assert printed.err == (
            f"marsinfer: error: no row has 'text' of the {read} rows read so far, and none is answered; "
            f"in.jsonl line {unreadable + 1}: there is no 'text'; it has: id, title "
            "(--text-column names the text)\n"
        )
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl"]
    source.write_text("\n".join([*rows[:255], json.dumps({"id": "x", "text": ""})]))
    assert batch(source, "--quiet") == 3  # the column is there, and every row an error


def test_a_second_run_finds_the_output_locked(batch, fish, tmp_path, capfd):
    from pipeline.outputs.lock import OutputLock

    with OutputLock(tmp_path / "out.parquet"):
        assert batch(fish) == 7
    assert "is being written by process" in capfd.readouterr().err
    assert batch(fish) == 0


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_other_columns_to_keep_are_written_without_answering_again(batch, tmp_path, capfd, no_weights, name):
    source = tmp_path / "in.parquet"
    rows = [{"id": f"doc-{n}", "text": f"fish {n} " * 9, "year": 1900 + n, "town": f"t{n}"} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), source)
    assert batch(source, "--keep-columns", "year:int16", out=name) == 0
    rows = [{**row, "town": row["town"].upper()} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), source)
    keep = ["--keep-columns", "town,year:string"]
    no_weights()
    capfd.readouterr()
    assert batch(source, "--resume", *keep, "--dry-run", out=name) == 0
    assert "resumed: 6 rows done, 0 new\ncolumns passed through:\n  town: string\n" in capfd.readouterr().out
    assert batch(source, "--resume", *keep, "--quiet", out=name) == 0
    assert capfd.readouterr().err.endswith("marsinfer: note: nothing new: every row was done\n")
    if name == "out.jsonl":
        table = [json.loads(line) for line in (tmp_path / name).open()]
    else:
        table = pq.read_table(tmp_path / name).to_pylist()
    found = [(row["town"], row["year"]) for row in table]
    assert found == [(f"T{n}", str(1900 + n)) for n in range(6)]
    assert batch(source, "--resume", *keep, "--quiet", out=name) == 0
    assert capfd.readouterr().err.endswith(f"every row was done; {tmp_path / name} stays as it is\n")


def test_rows_beyond_the_limit_keep_their_columns(batch, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"id": str(n), "text": "fish", "n": n}) + "\n" for n in range(4)))
    assert batch(source, "--keep-columns", "n:int") == 0
    source.write_text("".join(json.dumps({"id": str(n), "text": "fish", "n": -n}) + "\n" for n in range(4)))
    assert batch(source, "--keep-columns", "n:int,text", "--resume", "--limit", "2") == 0
    found = {id: (row["n"], row["text"]) for id, row in answers(tmp_path).items()}
    assert found == {"0": (0, "fish"), "1": (-1, "fish"), "2": (2, None), "3": (3, None)}
