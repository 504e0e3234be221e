"""Work that may take so long and no longer: nothing can stop a tokenizer, but nobody has to wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipeline.errors import MarsError, is_failure
from pipeline.records import RowError

T = TypeVar("T")
MOST_BEHIND = 4  # threads that nobody waits for any more; then one of them is waited for


class Within:
    """Runs pieces of work one after another, each in `seconds` at most; None: in this thread, unbounded."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._behind: list[threading.Thread] = []

    def run(self, work: Callable[[], T]) -> T:
        """What the work returns or raises; a RowError of the kind `timeout` if it takes longer.

        Its thread is then left behind, and ends when it ends.
        """
        if self._seconds is None:
            return work()
        self._behind = [thread for thread in self._behind if thread.is_alive()]
        if len(self._behind) >= MOST_BEHIND:
            self._behind[0].join()
        made: list[Any] = []
        thread = threading.Thread(target=_keep, args=(work, made), name="within", daemon=True)
        began = time.perf_counter()
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive():
            self._behind.append(thread)
        elif time.perf_counter() - began <= self._seconds:
            value, error = made
            if error is not None:
                raise error
            return value
        raise RowError("timeout", f"the text was not tokenized within --row-timeout {self._seconds:g} s")


@contextmanager
def tokenizer_faults() -> Iterator[None]:
    """What a tokenizer raises costs its row, not the run: a RowError of the kind `tokenizer`."""
    try:
        yield
    except (RowError, MarsError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise RowError("tokenizer", f"{type(error).__name__}: {error}") from error


def _keep(work: Callable[[], Any], made: list[Any]) -> None:
    try:
        made += [work(), None]
    except BaseException as error:  # noqa: BLE001 - handed over whole to who waits
        made += [None, error]
