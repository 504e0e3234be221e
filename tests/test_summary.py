"""How many rows a run expects, which is what its time left is reckoned from."""

from __future__ import annotations

import pytest

from pipeline.summary import Summary


@pytest.mark.parametrize(
    ("total_rows", "fraction_read", "at_most", "expected"),
    [(100, 0.3, None, 100), (None, 0.25, None, 40), (None, 0.25, 12, 12), (None, 1.0, 50, 10)],
)
def test_expected_rows(total_rows, fraction_read, at_most, expected):
    summary = Summary(method="dense", output="out.parquet")
    summary.expect(10, total_rows, fraction_read, at_most)
    assert summary.expected_rows == expected


@pytest.mark.parametrize(
    ("total_rows", "fraction_read", "at_most", "passed_over", "done_before", "expected"),
    [
        (100, 0.7, None, 60, 60, 40),  # the done rows came first
        (100, 0.1, None, 0, 60, 40),  # they are still to come
        (100, 0.5, None, 20, 60, 40),  # some were passed over, some are to come
        (30, 0.3, None, 20, 60, 10),  # all that were read were new or done
        (None, 0.25, None, 40, 60, 140),
        (None, 0.25, 50, 20, 40, 10),
        (None, 1.0, None, 990, 990, 10),
        (5, 1.0, None, 0, 0, 10),  # more were read than the file says there are
    ],
)
def test_rows_that_are_done_are_not_expected(
    total_rows, fraction_read, at_most, passed_over, done_before, expected
):
    summary = Summary(method="dense", output="out.parquet")
    counts = {"passed_over": passed_over, "done_before": done_before}
    summary.expect(10, total_rows, fraction_read, at_most, **counts)
    assert summary.expected_rows == expected


def test_in_the_end_there_is_no_more_to_expect():
    summary = Summary(method="dense", output="out.parquet")
    summary.expect(1, None, 0.5)
    summary.count("ok", prompt_tokens=7)
    summary.finish()
    assert (summary.expected_rows, summary.prompt_tokens) == (1, 7)
