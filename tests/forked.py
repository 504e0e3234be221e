"""Commands in processes of their own, forked from one that has imported everything, which would take seconds.

From then on all is as in a process that a user starts: its signals, locks, files and death are real.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

HEAVY = [
    *("marsinfer_cli.app", "marsinfer_cli.progress", "pipeline.run", "pipeline.prompts.forms"),
    *(
        "pipeline.engines.warm_up",
        "pipeline.outputs.standing",
        "pipeline.model.loading",
    ),
    # what transformers imports only for the tests' models
    *("transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen2.tokenization_qwen2_fast"),
    *("transformers.generation.continuous_batching", "tqdm.contrib.logging"),
]
SAVED = 5  # rows, each in a chunk of its own, before a held run waits

Say = Callable[[str], None]
Prepare = Callable[[Say], None]


class Forked:
    """A command that runs. What it prints, on stdout and stderr, goes to a file."""

    def __init__(self, words: Sequence[str], printed: Path, prepare: Prepare | None = None) -> None:
        """`prepare` is called in the new process before the command, with what tells `heard` a word."""
        start_server()
        self._printed = printed
        self._words, told = get_context("forkserver").Pipe(duplex=False)
        self._process = get_context("forkserver").Process(
            target=_run, args=(list(words), str(printed), dict(os.environ), told, prepare)
        )
        self._process.start()
        told.close()
        self.pid: int = self._process.pid

    def heard(self) -> str:
        """What `prepare` says next; an EOFError once the process has ended."""
        return self._words.recv()

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None if it does not end in time."""
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def printed(self) -> str:
        return self._printed.read_text(encoding="utf-8")


def start_server() -> None:
    """Start the process that others are forked from, if it does not run; it sees the modules that we see."""
    forkserver.set_forkserver_preload(HEAVY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()


def _run(
    words: list[str], printed: str, environment: dict[str, str], told: Connection, prepare: Prepare | None
) -> None:
    from marsinfer_cli.app import run

    os.environ.update(environment)
    tempfile.tempdir = None  # which the environment may have changed
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    if prepare is not None:
        prepare(told.send)
    sys.exit(run(words))


@contextmanager
def held_run(words: Sequence[str], printed: Path) -> Iterator[Forked]:
    """A command that has answered a few rows and waits, to be stopped in the middle; else it is killed."""
    process = Forked(words, printed, hold)
    try:
        assert process.heard() == "waiting", process.printed()
        yield process
    finally:
        process.kill()


def hold(say: Say) -> None:
    """Have a run wait once a few rows are saved, as in a layer without end: what `check` raises ends it."""
    from pipeline.engines import one_process
    from pipeline.engines.local import LocalEngine
    from pipeline.outputs.journal import Journal

    append, advance, saved = Journal.append, LocalEngine.advance, []

    def append_counted(self, answers):
        append(self, answers)
        saved.extend(answers)

    def advance_or_wait(self):
        if len(saved) < SAVED:
            return advance(self)
        say("waiting")
        while True:
            self.attempts.check()
            time.sleep(0.01)

    one_process.MOST_S = 0.0
    Journal.append, LocalEngine.advance = append_counted, advance_or_wait


def load_for_ever(say: Say) -> None:
    """Have a run's model load without end."""
    from pipeline.model.loading import UnloadedModel

    def load(self, *of):
        say("loading")
        time.sleep(3600)

    UnloadedModel.load = load
