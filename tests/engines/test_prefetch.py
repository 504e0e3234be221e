"""The producer thread: order, errors, bounds, and stopping."""

from __future__ import annotations

import threading

import pytest

from pipeline.engines.prefetch import ahead


def test_items_come_in_order():
    assert list(ahead(range(1000), depth=3)) == list(range(1000))


def test_an_error_comes_after_the_items_before_it():
    def broken():
        yield 1
        raise ValueError("page 2 is gone")

    items = ahead(broken(), depth=8)
    assert next(items) == 1
    with pytest.raises(ValueError, match="page 2 is gone"):
        next(items)


def test_the_producer_stays_within_its_depth():
    produced = []

    def counting():
        for number in range(100):
            produced.append(number)
            yield number

    items = ahead(counting(), depth=4)
    for taken in range(20):
        next(items)
        # four queued, one in hand waiting for room, and those taken
        assert len(produced) <= taken + 1 + 4 + 1
    items.close()


def test_closing_stops_the_thread():
    before = set(threading.enumerate())
    items = ahead(iter(int, 1), depth=2)
    next(items)
    (producer,) = set(threading.enumerate()) - before
    items.close()
    producer.join(300)  # which closing does not wait for without end
    assert not producer.is_alive()


@pytest.fixture
def stuck():
    """A producer that waits after its first item, as for a pipe into which nobody writes."""
    released = threading.Event()

    def items():
        yield 1
        released.wait()

    yield items()
    released.set()


@pytest.mark.slow
def test_waiting_can_be_ended(stuck, monkeypatch):
    monkeypatch.setattr("pipeline.engines.prefetch.LEAVE_AFTER_S", 0.1)

    def check():
        raise KeyboardInterrupt

    items = ahead(stuck, depth=2, check=check)
    assert next(items) == 1
    with pytest.raises(KeyboardInterrupt):
        next(items)


def test_a_producer_that_waits_is_left_behind(stuck, monkeypatch):
    monkeypatch.setattr("pipeline.engines.prefetch.LEAVE_AFTER_S", 0.1)
    items = ahead(stuck, depth=2)
    assert next(items) == 1
    items.close()
