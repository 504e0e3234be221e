"""Running a producer ahead of its consumer, in a thread, by a bounded number of items."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from queue import Empty, Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()

LOOK_UP_S = 1.0  # while waiting, so that an interrupt is not held up
LEAVE_AFTER_S = 2.0  # a producer that waits for a pipe or a network is left behind


def ahead(
    items: Iterable[T],
    depth: int,
    check: Callable[[], None] = lambda: None,
    patience_s: float | None = None,
) -> Generator[T | None, None, None]:
    """Yield `items`, produced by a thread that runs at most `depth` items ahead.

    An exception of the producer is raised here, in its place. Closing the generator stops the thread. `check`
    is called while there is nothing to yield; what it raises ends the waiting. With `patience_s`, None is
    yielded each time that there was nothing for so many seconds, for who has other things to look after.
    """
    queue: Queue[Any] = Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((_END, None))
        except BaseException as error:  # noqa: BLE001 - handed over whole to the consumer
            put((None, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = queue.get(timeout=patience_s or LOOK_UP_S)
            except Empty:
                check()
                if patience_s is not None:
                    yield None
                continue
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join(LEAVE_AFTER_S)
