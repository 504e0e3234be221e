"""Work within a time: what comes in time, what does not, and rows whose text takes too long to tokenize."""

from __future__ import annotations

import threading

import pytest
from prompt_parts import document

from pipeline.prompts.within import MOST_BEHIND, Within
from pipeline.records import RowError
from pipeline.setup.intake import encode_rows

LATE = "the text was not tokenized within --row-timeout {:g} s"


@pytest.mark.parametrize("seconds", [None, 600])
def test_what_comes_in_time_is_returned_or_raised(seconds):
    within = Within(seconds)
    assert within.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within.run(lambda: 1 // 0)


def test_a_row_that_takes_too_long_is_an_error_and_the_next_one_is_answered():
    held = threading.Event()

    class Prompts:
        def encode(self, document):
            if document.text == "slow":
                held.wait()
            return document

    rows = [document(text) for text in ("slow", "a", "slow", "b")]
    first, second, third, fourth = encode_rows(rows, Prompts(), "error", 0.5)
    held.set()
    assert (second.text, fourth.text) == ("a", "b")
    assert {first.kind, third.kind} == {"timeout"}
    assert first.message.endswith(LATE.format(0.5))


def test_no_more_than_a_few_threads_are_left_behind():
    held = threading.Event()
    within = Within(0.01)
    for _ in range(MOST_BEHIND):
        with pytest.raises(RowError, match="--row-timeout"):
            within.run(held.wait)
    threading.Timer(0.05, held.set).start()
    assert threading.active_count() >= MOST_BEHIND
    with pytest.raises(RowError, match="--row-timeout"):
        within.run(threading.Event().wait)  # once one has ended
    assert held.is_set()
