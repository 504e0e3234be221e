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
