"""Commands one after the other in a process of their own, as the hub's library reads its settings once.

As a program: for each line of JSON, the words of a command and changes of the environment, it answers one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


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
    """A process with this environment."""

    def __init__(self, largest_file: int | None = None, **environment: str) -> None:
        """No file may have more than `largest_file` bytes, as where a disk is full."""
        self.environment = environment
        path = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *([] if largest_file is None else [str(largest_file)])],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, *words: object, **environment: str | None) -> Outcome:
        """Run a command, with these changes of the environment, where None takes a variable away."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([list(map(str, words)), environment]), file=self._process.stdin, flush=True)
        return Outcome(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def _answer_all() -> None:
    from marsinfer_cli.app import run

    for bound in sys.argv[1:]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(bound), int(bound)))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    before = dict(os.environ)
    for line in sys.stdin:
        words, changes = json.loads(line)
        os.environ.clear()
        os.environ.update({key: value for key, value in {**before, **changes}.items() if value is not None})
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(words)
        print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    _answer_all()
