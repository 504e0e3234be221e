"""Commands in processes of one environment, as the hub's library reads its settings once.

As a program: for each line of JSON it forks a process from this one, which has imported everything.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What a command ended with, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a command that was refused before it did anything."""
        assert self.code == 2, self
        (line,) = self.err.splitlines()
        return line.removeprefix("marsinfer: error: ")


class Commands:
    """Runs commands, one after the other, each in a process of its own with this environment."""

    def __init__(self, **environment: str) -> None:
        self.environment = environment
        path = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, *words: object, largest_file: int | None = None, **environment: str | None) -> Outcome:
        """Run a command, with these changes of the environment, where None takes a variable away.

        No file may have more than `largest_file` bytes, as where a disk is full.
        """
        self.start(*words, largest_file=largest_file, **environment)
        return self.outcome()

    def start(self, *words: object, largest_file: int | None = None, **environment: str | None) -> int:
        """Begin to; returns the number of its process, for signals."""
        assert self._process.stdin is not None
        asked = [list(map(str, words)), environment, largest_file]
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return int(self._told())

    def outcome(self) -> Outcome:
        """Of the command that was started last, once it has ended."""
        return Outcome(*self._told())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _told(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def _run(
    words: list[str], changes: dict[str, str | None], largest_file: int | None, printed: list[str]
) -> None:
    from marsinfer_cli.app import run

    os.environ.update({name: value for name, value in changes.items() if value is not None})
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
    for stream, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(run(words))


def _tell(value: Any) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def _answer_all() -> None:
    from forked import HEAVY

    for module in HEAVY:
        with suppress(ImportError):  # as other versions of a library have other modules
            import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        printed = [f"{folder}/out", f"{folder}/err"]
        for line in sys.stdin:
            process = get_context("fork").Process(target=_run, args=(*json.loads(line), printed))
            process.start()
            _tell(process.pid)
            process.join()
            texts = [Path(path).read_text(encoding="utf-8") for path in printed]
            _tell([process.exitcode, *texts])


if __name__ == "__main__":
    _answer_all()
