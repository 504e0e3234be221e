"""What becomes of a run that is stopped: signals, too many errors, a second run, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from marsinfer_cli.app import run

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads fight where the tests run side by side
FLAGS = ["--question", "what?", "--id-column", "id", "--max-new-tokens", "3", "--pack-tokens", "1"]


@pytest.fixture
def batch(model_folder, tmp_path):
    def call(source, *flags):
        words = [
            "batch",
            "--model",
            str(model_folder),
            *FLAGS,
            *flags,
            str(source),
            str(tmp_path / "out.parquet"),
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


def test_resume_with_nothing_to_resume_starts_afresh_and_then_says_that_nothing_is_new(
    batch, fish, tmp_path, capfd
):
    assert batch(fish, "--resume") == 0
    first = answers(tmp_path)
    assert len(first) == 6
    capfd.readouterr()
    assert batch(fish, "--resume") == 0
    assert "nothing new: every row was done" in capfd.readouterr().err
    assert {id: row["answer"] for id, row in answers(tmp_path).items()} == {
        id: row["answer"] for id, row in first.items()
    }


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
    assert batch(fish) == 0
    capfd.readouterr()
    assert batch(fish, "--resume", "--set", "eta=0.5", "--max-new-tokens", "9") == 2
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


def test_the_second_row_of_an_id_is_an_error_that_names_both(batch, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "a", "text": "one fish"}\n{"id": "a", "text": "two fish"}\n')
    assert batch(source) == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["id"], row["row"], row["status"]) for row in rows] == [("a", 0, "ok"), ("a", 1, "error")]
    assert rows[1]["error_type"] == "duplicate_id"
    assert "in.jsonl line 2" in rows[1]["error_message"]
    assert "row 0" in rows[1]["error_message"]


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
def test_a_signal_ends_the_run_in_good_order_and_it_can_go_on(model_folder, tmp_path, number, code):
    source = write_rows(tmp_path / "in.jsonl", [f"fish {n} " * 30 for n in range(200)])
    words = [sys.executable, "-m", "marsinfer_cli", "batch", "--model", str(model_folder), *FLAGS, "--resume"]
    process = subprocess.Popen(
        [*words, str(source), str(tmp_path / "out.parquet")],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=ONE_THREAD,
    )
    part = tmp_path / ".out.parquet.journal" / "part-0001"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 20_000):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, printed = process.communicate(timeout=10)
    assert process.returncode == code
    assert "--resume" in printed.splitlines()[-1]
    assert not (tmp_path / "out.parquet").exists()
    done = subprocess.run(
        [*words, str(source), str(tmp_path / "out.parquet"), "--json"], capture_output=True, env=ONE_THREAD
    )
    assert done.returncode == 0
    assert 0 < json.loads(done.stdout)["documents"] < 200
    assert list(answers(tmp_path)) == [f"doc-{n}" for n in range(200)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_model_loads_ends_the_run_at_once(fish, tmp_path, number, code):
    # run in a process of its own, in which loading never ends
    program = (
        "import sys, time, marsinfer_cli.app as app, pipeline.batch as batch; "
        "batch._load = lambda config: (print('loading', flush=True), time.sleep(60)); "
        "sys.exit(app.run(sys.argv[1:]))"
    )
    words = ["batch", *FLAGS, "--quiet", str(fish), str(tmp_path / "out.parquet")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, printed = process.communicate(timeout=10)
    assert (process.returncode, printed) == (
        code,
        "marsinfer: error: interrupted; no row of this run was finished\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_second_run_finds_the_output_locked(batch, fish, tmp_path, capfd):
    from pipeline.io.lock import OutputLock

    with OutputLock(tmp_path / "out.parquet"):
        assert batch(fish) == 7
    assert "is being written by process" in capfd.readouterr().err
    assert batch(fish) == 0
