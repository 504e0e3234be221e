"""Two runs row by row."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from report_outputs import answered, failed, write

from pipeline.report.compare import by_words, compare, likeness
from pipeline.report.output_reading import opened


def compared(tmp_path, first, second, **options):
    paths = [write(tmp_path / "dense.parquet", first), write(tmp_path / "pruned.arrow", second)]
    with opened([str(path) for path in paths]) as runs:
        return compare(*runs, **options)


def test_rows_are_joined_by_id_and_sorted_by_disagreement(tmp_path):
    first = [answered(n, answer="one fish two fish", ttft_ms=100.0) for n in range(5)]
    second = [
        answered(4, answer="one fish two fish", ttft_ms=50.0),
        answered(3, answer="one fish two fish", ttft_ms=90.0),
        answered(2, answer="one fish red fish", ttft_ms=100.0),
        failed(1),
        answered(9),
    ]
    found = compared(tmp_path, first, second)
    assert (found.joined_by, found.joined, found.only_first, found.only_second) == ("id", 4, 1, 1)
    assert (found.one_failed, found.both_failed, found.same_answers, found.both_answered) == (1, 0, 2, 3)
    assert [pair.first["row"] for pair in found.most] == [1, 2], "rows with the same answer are left out"
    assert found.differing == 2
    assert found.most[0].similarity is None
    assert 0 < found.most[1].similarity < 1
    tokens, ratios = found.speed_ratios()
    assert len(tokens) == 3
    np.testing.assert_allclose(ratios, [2, 100 / 90, 1], rtol=1e-6)


def test_outputs_without_a_common_id_are_joined_by_row(tmp_path):
    first = [answered(n, id=f"a:{n}") for n in range(4)]
    second = [answered(n, id=f"b:{n}") for n in range(1, 5)]
    found = compared(tmp_path, first, second)
    assert (found.joined_by, found.joined, found.only_first, found.only_second) == ("row", 3, 1, 1)
    assert found.same_answers == 3


def test_rows_of_another_text_are_counted(tmp_path):
    found = compared(tmp_path, [answered(0), answered(1)], [answered(0), answered(1, row_hash="other")])
    assert (found.joined, found.other_input) == (2, 1)


def test_rows_that_share_an_id_find_each_other(tmp_path):
    rows = [answered(0), failed(7, "duplicate_id")]
    rows[1].id = "id 0"
    found = compared(tmp_path, rows, rows[::-1])
    assert (found.joined, found.only_first, found.both_failed, found.same_answers) == (2, 0, 1, 1)


def test_a_failed_row_and_a_question_of_its_id_each_find_their_own(tmp_path):
    """Though in the second run the failed row has the number that the question's has in the first."""
    runs = []
    for start in (0, 1):
        alone, asked = failed(start), answered(start + 1, question_index=1, answer="the same")
        alone.id = asked.id = "a#1"
        runs.append([alone, asked])
    found = compared(tmp_path, *runs)
    assert (found.joined, found.only_first, found.both_failed, found.same_answers) == (2, 0, 1, 1)


def test_only_the_greatest_disagreements_are_kept(tmp_path):
    first = [answered(n, answer="x" * 50) for n in range(60)]
    second = [answered(n, answer="x" * (50 - n % 50) + "y" * (n % 50)) for n in range(60)]
    found = compared(tmp_path, first, second, most=7)
    assert [pair.first["row"] for pair in found.most] == [49, 48, 47, 46, 45, 44, 43]
    assert found.both_answered == 60


def test_nothing_in_common_is_no_failure(tmp_path):
    found = compared(tmp_path, [answered(0)], [])
    assert (found.joined, found.only_first, found.most) == (0, 1, [])


def test_without_rapidfuzz_words_are_matched(tmp_path, monkeypatch):
    assert "rapidfuzz" in likeness()[1]
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    measure, name = likeness()
    assert measure is by_words
    assert "difflib" in name
    assert measure("a b c d", "a b x d") == pytest.approx(0.75)
    assert measure("", "") == 1
    assert (
        compared(tmp_path, [answered(0, answer="a b")], [answered(0, answer="a c")]).most[0].similarity == 0.5
    )
