"""What ends a run in good order: the first SIGINT, SIGTERM or SIGHUP, or a deadline.

A second signal ends it at once. One that comes within a second of the first is the same stop: `timeout`, a
terminal under `npm` or `uv run`, and others signal a process both by itself and as one of its group.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import KEPT, DeadlineReached, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_STOP_S = 1.0  # seconds in which signals belong to one stop

_nothing_to_lose = False


@contextmanager
def graceful_stop(kept: str | Callable[[], str] = KEPT) -> Iterator[Callable[[], None]]:
    """Give a function that raises `Interrupted` once a signal has come; to be called often.

    `kept` ends its message: what becomes of the work so far; a function is asked when the signal has come.
    Until its first call nothing is in flight, and a signal ends the process by SystemExit; so it does within
    `nothing_to_lose`. A second signal, `ONE_STOP_S` or more later, ends it as if nobody had listened: what is
    in the journal stays there. A SIGHUP that is ignored stays so, as `nohup` wants it. Only the main thread
    may use this.
    """
    received: list[int] = []
    came_s = 0.0
    checked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came_s
        if received:
            if time.monotonic() - came_s < ONE_STOP_S:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        came_s = time.monotonic()
        if not checked or _nothing_to_lose:
            raise SystemExit(128 + number)

    def check() -> None:
        nonlocal checked
        checked = True
        if received:
            name = signal.Signals(received[0]).name
            told = kept if isinstance(kept, str) else kept()
            raise Interrupted(f"stopped by {name}; {told}", 128 + received[0])

    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    before = {number: signal.signal(number, handle) for number in SIGNALS if number not in ignored}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def nothing_to_lose() -> Iterator[None]:
    """For work that may be left undone and takes long without a call, such as loading a model."""
    global _nothing_to_lose
    _nothing_to_lose = True
    try:
        yield
    finally:
        _nothing_to_lose = False


class RunDeadline:
    """The moment at which a run ends, with rows in flight given up, unless all its rows are answered."""

    def __init__(
        self, at: float | None, told: str, check: Callable[[], None], done: Callable[[], str]
    ) -> None:
        """`at` is in seconds of time.time(), None for no deadline, and `told` says it in words.

        `check` is called by `check` too, and `done` says what the run has done when it ends.
        """
        self._at, self._told, self._check, self._done = at, told, check, done

    def check(self) -> None:
        """Raise DeadlineReached once the moment has come; to be called often."""
        self._check()
        if self._at is not None and time.time() >= self._at:
            raise DeadlineReached(f"stopped at the deadline, {self._told}: {self._done()}; {KEPT}")

    def lift(self) -> None:
        """Let the run go on to its end: all that is left is to write what it has answered."""
        self._at = None
