"""Two signals, of one stop or of somebody who does not want to wait, and one before anything has begun."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal, sys, time
from pipeline.errors import Interrupted
from pipeline.interrupts import graceful_stop

clock = iter([100.0, 100.0 + float(sys.argv[1])])
with graceful_stop() as check:
    check()
    time.monotonic = lambda: next(clock)
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    try:
        check()
    except Interrupted as stopped:
        print(stopped)
        sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize(("apart_s", "code"), [(0.0, 143), (0.9, 143), (1.1, -signal.SIGTERM)])
def test_signals_of_one_second_are_one_stop(apart_s, code):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(apart_s)], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout.startswith("stopped by SIGTERM")) == (code, code == 143)


UNWOUND = """
import os, signal, sys
from pipeline.interrupts import Stopped, unwind_on_signals

unwind_on_signals()
try:
    signal.raise_signal(signal.SIGTERM)
finally:
    signal.raise_signal(signal.SIGTERM)  # that `timeout` sends to the group too
    print("children and files are gone")
"""


def test_where_nothing_is_to_lose_a_stop_still_cleans_up():
    ended = subprocess.run([sys.executable, "-c", UNWOUND], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "children and files are gone\n", "")


IMPORTING = """
import signal, sys

class Interrupting:
    def find_spec(name, *others):
        if name == "marsinfer_cli.bench":
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:
                if "caught" not in sys.argv:
                    raise
                raise ImportError("half of a library")

sys.meta_path.insert(0, Interrupting)
from marsinfer_cli.start import main
main()
"""


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--quiet"], "marsinfer: error: interrupted\n"),
        (["--log-format=json"], '{"event": "error", "time": "'),
        (["caught"], "marsinfer: error: interrupted\n"),  # by a library that fails because of it
    ],
)
def test_a_ctrl_c_while_modules_are_imported_is_told_in_one_line(flags, told):
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTING, "batch", *flags], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr[: len(told)]) == (130, "", told)
    assert ended.stderr.count("\n") == 1


ENDING = """
import os, sys
from pipeline.interrupts import finish_on_signals, unwind_on_signals

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=int(sys.argv[1])):
        kill(process, number)

unwind_on_signals()
late = Late()
finish_on_signals()
sys.exit(5)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_interpreter_ends_changes_no_exit_code(number):
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, str(int(number))], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (5, "")
