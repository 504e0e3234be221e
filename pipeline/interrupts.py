"""What ends a run in good order: the first SIGINT, SIGTERM or SIGHUP, or a deadline.

A second signal ends it at once. One that comes within a second of the first is the same stop: `timeout`, a
terminal under `npm` or `uv run`, and others signal a process both by itself and as one of its group. A signal
that is ignored when the run begins stays so: `nohup` wants that of SIGHUP, and a shell without job control
of SIGINT, for what it runs in the background.
"""

from __future__ import annotations

import atexit
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
_unwound_by: int | None = None  # the signal of a stop that is to end the process, wherever it is caught
_last_stop_s = float("-inf")  # by time.monotonic()


class Stopped(SystemExit):
    """What a signal ends the process with where there is nothing to lose."""

    def __init__(self, number: int) -> None:
        """`number` is the signal's."""
        super().__init__(128 + number)
        self.exit_code = 128 + number


@contextmanager
def graceful_stop(kept: str | Callable[[], str] = KEPT) -> Iterator[Callable[[], None]]:
    """Give a function that raises `Interrupted` once a signal has come; to be called often.

    `kept` ends its message: what becomes of the work so far; a function is asked when the signal has come.
    Until its first call nothing is in flight, and a signal ends the process by `Stopped`; so it does within
    `nothing_to_lose`. A second signal, `ONE_STOP_S` or more later, ends it as if nobody had listened: what is
    in the journal stays there. Only the main thread may use this.
    """
    if _unwound_by is not None:
        raise Stopped(_unwound_by)
    received: list[int] = []
    checked = thrown = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal thrown
        if received:
            _end_at_once(number)
            return
        received.append(number)
        _note_stop()
        if not checked or _nothing_to_lose:
            thrown = True
            raise Stopped(number)

    def check() -> None:
        nonlocal checked
        checked = True
        if received:
            name = signal.Signals(received[0]).name
            told = kept if isinstance(kept, str) else kept()
            raise Interrupted(f"stopped by {name}; {told}", 128 + received[0])

    before = {number: signal.signal(number, handle) for number in _heeded()}
    try:
        yield check
    except Exception as error:
        if thrown and not isinstance(error, Interrupted):
            raise Stopped(received[0]) from error  # see `stop_remembered`
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def unwind_on_signals() -> None:
    """Let a signal end the process by `Stopped`, so that its temporary files and children go with it.

    For a process that is all ours; `graceful_stop` takes over for as long as there is something to lose. A
    second signal, `ONE_STOP_S` or more later, ends the process at once.
    """
    atexit.register(_ignore)  # first, and so called last
    for number in _heeded():
        signal.signal(number, _unwind)


@contextmanager
def stop_remembered() -> Iterator[None]:
    """Have an error behind a stop end as the stop does.

    Libraries that are being imported may catch `Stopped`, as any failure of an import, and fail later.
    """
    try:
        yield
    except Exception as error:
        if _unwound_by is None:
            raise
        raise Stopped(_unwound_by) from error


def finish_on_signals() -> None:
    """Let a signal change nothing, as all is said and written; a second one ends the process at once."""
    for number in _heeded():
        signal.signal(number, _finish)


def _unwind(number: int, frame: FrameType | None) -> None:
    global _unwound_by
    if _is_first(number):
        _unwound_by = number
        raise Stopped(number)


def _finish(number: int, frame: FrameType | None) -> None:
    _is_first(number)


def _ignore() -> None:
    """Let no signal end an interpreter that takes itself down, where handlers are gone before modules are."""
    for number in _heeded():
        signal.signal(number, signal.SIG_IGN)


def _is_first(number: int) -> bool:
    """Whether this signal begins the stop; one that comes too late for that ends the process."""
    if _last_stop_s > float("-inf"):
        _end_at_once(number)
        return False
    _note_stop()
    return True


def _note_stop() -> None:
    global _last_stop_s
    _last_stop_s = time.monotonic()


def _end_at_once(number: int) -> None:
    """End as if nobody had listened, unless the signal belongs to the stop that is going on."""
    if time.monotonic() - _last_stop_s >= ONE_STOP_S:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _heeded() -> list[signal.Signals]:
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


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
