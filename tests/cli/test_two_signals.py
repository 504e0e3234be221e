"""Two signals: of one stop, as `timeout` sends them, and of somebody who does not want to wait."""

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
