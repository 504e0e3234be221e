"""Standard output and error of a command, which does its work whether or not they can be written."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class BestEffort:
    """A stream whose reader may leave, or whose disk may be full: what cannot be written is let go."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None  # the first

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self.error = self.error or error
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def best_effort() -> Iterator[BestEffort]:
    """Let stdout, which is given, and stderr end nothing when they cannot be written."""
    before = sys.stdout, sys.stderr
    out, err = (BestEffort(stream or _nowhere()) for stream in before)
    if before[0] is None:  # what is a command's result would be lost without a word
        out.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            stream.flush()
            if stream.error is not None:
                _lead_nowhere(stream)


def keep_descriptors() -> None:
    """Lead standard streams that are closed nowhere: the next file opened would be taken for them.

    What is written to standard output fails as it did.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # the lowest number that is free is this one
            os.open(os.devnull, os.O_RDONLY if descriptor == 1 else os.O_RDWR)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _lead_nowhere(stream: BestEffort) -> None:
    """For what is still to be written, of which Python would complain at its end, with another exit code."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
