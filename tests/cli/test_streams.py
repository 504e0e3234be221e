"""Messages are best effort: who does not read them, or has no room for them, ends no run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from marsinfer_cli.app import run
from marsinfer_cli.messages import best_effort, keep_descriptors
from pipeline.interrupts import graceful_stop

ASK = ["--text-column", "body", "--question-column", "ask", "--max-new-tokens", "3"]


@pytest.fixture
def left(monkeypatch):
    """A standard stream, by name, whose reader has left or whose disk is full; it is used at the end."""
    opened = []

    def left(name, kind):
        if kind == "full":
            file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
        else:
            reader, writer = os.pipe()
            os.close(reader)
            file = os.fdopen(writer, "w")
        opened.append(file)
        monkeypatch.setattr(sys, name, file)

    yield left
    for file in opened:
        file.close()  # would raise, had what was left not been led away


@pytest.mark.parametrize("kind", ["left", "full"])
def test_a_run_ends_as_its_work_does(call, fish, tmp_path, left, kind):
    left("stdout", kind)
    left("stderr", kind)
    assert call(fish, tmp_path / "out.parquet", *ASK, "--json") == 0
    assert call(fish, tmp_path / "out.parquet", *ASK, "--order", "x") == 2


def test_a_result_that_only_is_printed_is_lost_with_a_message(left, capsys):
    left("stdout", "full")
    assert run(["methods"]) == 8
    full = os.strerror(errno.ENOSPC)
    assert capsys.readouterr().err == f"marsinfer: error: the result cannot be printed: {full}\n"
    left("stdout", "left")
    assert (run(["methods"]), capsys.readouterr().err) == (1, "")


def test_streams_that_are_not_there_and_characters_that_cannot_be_written(monkeypatch, tmp_path):
    path = tmp_path / "log"
    with path.open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "stderr", None)
        with best_effort():
            sys.stdout.write("é\ud800\n")
            sys.stderr.write("nobody hears\n")
    assert path.read_text() == "\\xe9\\ud800\n"


def test_closed_descriptors_are_taken_before_a_file_takes_them():
    code = (
        "import os; from marsinfer_cli.messages import keep_descriptors as k; k(); print(os.open('/', 0) > 2)"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -c "{code}" <&- 2>&-'], stdout=subprocess.PIPE
    )
    assert (done.returncode, done.stdout) == (0, b"True\n")
    keep_descriptors()  # changes nothing where all are open


@pytest.mark.parametrize(
    "words", [["methods"], ["batch", "-", "-", "--model", "random:tiny", "--question", "q"]]
)
def test_a_result_for_a_stdout_that_is_closed_is_no_success(words):
    command = [sys.executable, "-m", "marsinfer_cli", *words]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        input='{"text": "fish"}\n',
        stderr=subprocess.PIPE,
        text=True,
    )
    told = "the result cannot be printed" if words == ["methods"] else "standard output cannot be written"
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last) == (8, f"marsinfer: error: {told}: {os.strerror(errno.EBADF)}")


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_stays_so(number, before):
    was = signal.signal(number, before)
    try:
        with graceful_stop():
            assert (signal.getsignal(number) == signal.SIG_IGN) == (before == signal.SIG_IGN)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, was)
