"""Where the command starts: from here on a signal ends it in one line, and by its exit code."""

from __future__ import annotations

import sys

from marsinfer_cli import own_place  # noqa: F401 - before what it looks after
from marsinfer_cli.events import complain, wants_events
from pipeline.interrupts import Stopped, finish_on_signals, stop_remembered, unwind_on_signals


def main() -> None:
    """Run the command line and exit with a code of the guide to exit codes."""
    unwind_on_signals()
    try:
        with stop_remembered():
            from marsinfer_cli.app import main  # takes long enough for a Ctrl-C

            main()
    except Stopped as stop:
        sys.exit(complain("interrupted", stop.exit_code, in_events=wants_events(sys.argv[1:])))
    finally:
        finish_on_signals()
