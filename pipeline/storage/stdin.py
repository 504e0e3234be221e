"""Standard input, as far as a reader treats it as a file."""

from __future__ import annotations

import io
import sys
from typing import BinaryIO, cast

from pipeline.errors import InputError
from pipeline.storage.sniff import kind_of

NAMES = ("-", "/dev/stdin")


class Once:
    """What is no file, as far as rows come from it, once."""

    name = address = "rows"
    suffix = ""

    def __str__(self) -> str:
        return self.name

    def is_file(self) -> bool:
        """Whether it can be read more than once."""
        return False

    def open(self, mode: str = "rb") -> BinaryIO:
        raise io.UnsupportedOperation(f"{self.name} have no bytes")


class Stdin(Once):
    """JSON lines that come through a pipe, once."""

    name = address = "stdin"
    suffix = ".jsonl"

    def __init__(self) -> None:
        self._is_read = False

    def check(self) -> None:
        """Refuse what cannot be JSON lines; waits for the first bytes."""
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("there is no standard input; name a file, or pipe JSON lines into the command")
        if sys.stdin.isatty():
            raise InputError("standard input is a terminal; pipe JSON lines into the command, or name a file")
        start = _buffered().peek(8)[:8]
        kind = kind_of(start)
        if kind is not None:
            raise InputError(
                f"standard input is {kind}, and must be plain JSON lines; save it to a file and name that"
            )

    def first_line(self) -> bytes | None:
        """The first line without taking it, if it has come whole already."""
        if self._is_read:
            return None
        line, newline, _ = _buffered().peek().partition(b"\n")
        return line if newline else None

    def open(self, mode: str = "rb") -> BinaryIO:
        assert mode == "rb"
        if self._is_read:
            raise InputError("standard input can be read only once; save it to a file and name that")
        self._is_read = True
        buffered = _buffered()
        head = buffered.peek()
        buffered.read(len(head))
        return cast(BinaryIO, io.BufferedReader(_Rest(head, cast(io.RawIOBase, buffered.raw))))


def _buffered() -> io.BufferedReader:
    return cast(io.BufferedReader, sys.stdin.buffer)


class _Rest(io.RawIOBase):
    """What was looked at already, then the rest.

    Without the lock of `sys.stdin`, for which the interpreter's end would wait while a thread reads.
    """

    def __init__(self, head: bytes, raw: io.RawIOBase) -> None:
        self._head = head
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int | None:  # type: ignore[override]
        if not self._head:
            return self._raw.readinto(buffer)
        part, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
