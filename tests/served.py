"""A command that scripts call, run within the tests' own process, which has imported everything."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, closing, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import pytest

from marsinfer_cli.app import run

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    with connection.makefile("rw") as stream:
        print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]), file=stream, flush=True)
        code, out, err = json.loads(stream.readline())
print(out, end="")
print(err, end="", file=sys.stderr)
sys.exit(code)
"""


class Served:
    """The command as a program at `path`, while `shell` runs what calls it."""

    def __init__(self, path: Path) -> None:
        self._folder = TemporaryDirectory()  # whose name is short, as those of sockets must be
        address = f"{self._folder.name}/socket"
        path.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
        path.chmod(0o755)
        self.calls: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(address)
        self._socket.listen()
        self._socket.settimeout(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()
        self._folder.cleanup()

    def shell(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, in this environment, with its calls of the command."""
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(shell, *command, **environment)
            while not done.done():
                try:
                    connection, _ = self._socket.accept()
                except TimeoutError:
                    continue
                with closing(connection), connection.makefile("rw") as stream:
                    json.dump(self._answer(*json.loads(stream.readline())), stream)
                    stream.write("\n")
        return done.result()

    def _answer(self, words: list[str], folder: str, environment: dict[str, str]) -> list[Any]:
        """The exit code of a call, and what it printed."""
        self.calls.append(words)
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, chdir(folder), redirect_stdout(out), redirect_stderr(err):
            for name, value in environment.items():
                patch.setenv(name, value)
            code = run(words)
        return [code, out.getvalue(), err.getvalue()]


def shell(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=900,
    )
