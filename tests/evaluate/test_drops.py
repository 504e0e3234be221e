"""Drops of scores by document, their intervals and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluate.drops import FEW_DECIDE, TAIL, Paired, fewest_documents
from pipeline.settings.parse import parse_drop


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 57])
def test_dense_against_itself_drops_by_nothing_as_far_as_so_few_can_tell(relative, rows):
    drop = Paired.of([1.0] * rows, [1.0] * rows, relative=relative).drop()
    assert drop.drop == 0
    assert drop.high == pytest.approx(100 * (1 - 0.025 ** (1 / rows)))
    assert drop.low < 0 < drop.high


def test_points_and_percent():
    dense, method = [1.0, 0.5, 0.5, 0.0] * 30, [0.5, 0.5, 0.5, 0.0] * 30
    points, percent = (Paired.of(dense, method, relative=relative).drop() for relative in (False, True))
    assert (points.dense, points.method) == (0.5, 0.375)
    assert (points.drop, percent.drop) == pytest.approx((12.5, 25.0))
    assert 5 < points.low < points.drop < points.high < 20
    assert 10 < percent.low < percent.drop < percent.high < 40


def test_a_method_that_is_better_drops_below_zero():
    drop = Paired.of([0.0, 1.0, 0.0] * 70, [1.0] * 210).drop()
    assert drop.high < 0


def test_documents_weigh_equally_however_many_rows_they_have():
    dense = [1.0] * 10
    method = [0.0, *[1.0] * 9]
    documents = ["a", *["b"] * 9]
    drop = Paired.of(dense, method, documents=documents).drop()
    assert (drop.rows, drop.documents, drop.drop) == (10, 2, 50.0)
    assert Paired.of(dense, method).drop().drop == pytest.approx(10.0)


def test_rows_of_one_document_are_no_evidence_of_others():
    one = Paired.of([1.0] * 500, [1.0] * 500, documents=["a"] * 500)
    assert one.drop().high == pytest.approx(97.5)
    assert one.judge(2.0).verdict == "inconclusive"


@pytest.mark.parametrize(("bound", "needed"), [(2.0, 183), (1.0, 368), (0.0, None), (100.0, 1)])
def test_what_a_pass_costs_at_least(bound, needed):
    assert fewest_documents(bound) == needed
    if needed is not None and needed > 1:
        verdicts = [Paired.of([1.0] * n, [1.0] * n).judge(bound).verdict for n in (needed - 1, needed)]
        assert verdicts == ["inconclusive", "pass"]


def test_a_drop_of_all_fails_and_says_by_how_much():
    lost = Paired.of([1.0] * 100, [0.0] * 20 + [1.0] * 80)
    assert lost.judge(2.0).verdict == "fail"
    assert lost.judge(40.0).verdict == "pass"
    between = lost.judge(20.0)
    assert (between.verdict, between.documents_needed) == ("inconclusive", None)


def test_the_documents_that_are_said_to_decide_do():
    def lost(documents):
        return Paired.of([1.0] * documents, [float(n % 20 > 0) for n in range(documents)])

    few = lost(60).judge(8.0)
    assert few.verdict == "inconclusive"
    assert few.documents_needed is not None
    enough = 20 * math.ceil(few.documents_needed / 20)
    assert lost(enough).judge(8.0).verdict == "pass"
    assert lost(enough - 40).judge(8.0).verdict == "inconclusive"


def test_losses_drop_by_their_rise_which_is_cut_at_a_nat():
    dense = [2.0, 4.0, 3.0, 3.0] * 50
    drop = Paired.of(dense, [2.5, 4.0, 3.5, 3.2] * 50, losses=True).drop()
    assert (drop.relative, drop.drop) == (True, pytest.approx(10.0))
    assert 5 < drop.low < drop.drop < drop.high < 20
    wild = Paired.of(dense, [*dense[1:], 1000.0], losses=True)
    tame = Paired.of(dense, [*dense[1:], 100.0], losses=True)
    assert wild.p_beyond(5.0) == tame.p_beyond(5.0)
    one = Paired.of([2.0], [2.5], losses=True).drop()
    assert (one.low, one.high) == (-math.inf, math.inf)


def test_what_a_rise_that_counts_as_a_nat_lets_pass_is_not_shown():
    one = Paired.of([2.0] * 400, [400.0] + [1.9] * 399, losses=True)  # a rise of 45% in all
    assert one.p_beyond(2.0) < TAIL
    assert one.drop().low < 0 < 2 < one.drop().drop == one.drop().high
    judgement = one.judge(2.0)
    assert (judgement.verdict, judgement.reason) == ("inconclusive", FEW_DECIDE)
    assert one.judge_rows(2.0).verdict == "fail"


def test_a_relative_drop_where_dense_scores_nothing():
    better = Paired.of([0.0] * 6, [0.0, 1.0] * 3, relative=True).drop()
    assert (better.drop, better.low) == (-math.inf, -math.inf)
    nothing = Paired.of([0.0] * 5, [0.0] * 5, relative=True).drop()
    assert (nothing.drop, nothing.low) == (0.0, -math.inf)


@pytest.mark.parametrize(
    ("dense", "relative", "bound", "has_room"),
    [
        (0.0, False, 2.0, False),
        (0.02, False, 2.0, False),
        (0.5, False, 2.0, True),
        (0.01, True, 2.0, True),
        (0.0, True, 2.0, False),
    ],
)
def test_scores_that_have_nothing_to_lose_are_told(dense, relative, bound, has_room):
    scores = [dense] * 300
    assert (Paired.of(scores, scores, relative=relative).no_room(bound) is None) == has_room


@pytest.mark.parametrize(("lost", "verdict"), [(0.0, "pass"), (0.02, "pass"), (0.03, "fail"), (-0.1, "pass")])
def test_rows_alone_are_judged_by_their_own_drop(lost, verdict):
    assert Paired.of([0.5] * 8, [0.5 - lost] * 8).judge_rows(2.0).verdict == verdict


def test_the_same_scores_give_the_same_numbers():
    rng = np.random.default_rng(0)
    dense, method = rng.random(60).tolist(), rng.random(60).tolist()
    assert Paired.of(dense, method).drop() == Paired.of(dense, method).drop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "at least one"),
        (([1.0], [1.0, 0.0]), "1 dense scores and 2 of the method"),
        (([1.0], [1.5]), "a score is not between 0 and 1"),
        (([math.nan], [1.0]), "a score is not between 0 and 1"),
    ],
)
def test_scores_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Paired.of(*arguments).drop()


def test_losses_and_documents_that_cannot_be():
    with pytest.raises(ValueError, match="a loss is below 0"):
        Paired.of([1.0], [-0.5], losses=True).drop()
    with pytest.raises(ValueError, match="1 documents of 2 rows"):
        Paired.of([1.0, 1.0], [1.0, 0.0], documents=["a"]).drop()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1pt", (1.0, False)),
        ("0.5 pt", (0.5, False)),
        (" 2%", (2.0, True)),
        (".5%", (0.5, True)),
        ("0pt", (0.0, False)),
    ],
)
def test_parse_drop(text, expected):
    assert parse_drop(text) == expected


@pytest.mark.parametrize("text", ["1", "", "pt", "-1pt", "1 point", "1e2%", "nan%", "1,5pt", "101pt"])
def test_drops_that_cannot_be(text):
    with pytest.raises(ConfigError) as caught:
        parse_drop(text)
    assert str(caught.value).startswith(f"--max-drop {text!r}: ")
