"""SIGINT, SIGTERM and SIGHUP: the first ends a run in good order, the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import KEPT, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_nothing_to_lose = False


@contextmanager
def graceful_stop(kept: str | Callable[[], str] = KEPT) -> Iterator[Callable[[], None]]:
    """Give a function that raises `Interrupted` once a signal has come; to be called often.

    `kept` ends its message: what becomes of the work so far; a function is asked when the signal has come.
    Until its first call nothing is in flight, and a signal ends the process by SystemExit; so it does within
    `nothing_to_lose`. A second signal ends it as if nobody had listened: what is in the journal stays there.
    A SIGHUP that is ignored stays so, as `nohup` wants it. Only the main thread may use this.
    """
    received: list[int] = []
    checked = False

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
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
