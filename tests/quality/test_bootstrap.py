import math
from typing import Any

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.quality.bootstrap import Drop, judge, paired_drop
from pipeline.settings.parse import parse_drop


def drop_of(drop: float, low: float, high: float, rows: int = 100) -> Drop:
    return Drop(
        rows=rows,
        clusters=rows,
        dense=0.5,
        method=0.5 - drop / 100,
        relative=False,
        drop=drop,
        low=low,
        high=high,
        confidence=0.95,
    )


def scores(rows: int, seed: int, mean: float = 0.5) -> list[float]:
    return (np.random.default_rng(seed).random(rows) < mean).astype(float).tolist()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 57])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clustered", [False, True])
def test_dense_against_itself(relative: bool, rows: int, weighted: bool, clustered: bool) -> None:
    rng = np.random.default_rng(rows)
    dense = rng.random(rows).tolist()
    more: dict[str, Any] = {"weights": rng.integers(1, 90, rows).tolist()} if weighted else {}
    if clustered:
        more["clusters"] = [str(row // 2) for row in range(rows)]
    drop = paired_drop(dense, list(dense), relative=relative, **more)
    assert (drop.drop, drop.low, drop.high) == (0.0, 0.0, 0.0)
    assert drop.dense == drop.method
    assert judge(drop, 0.0).verdict == "pass"


def test_dense_that_scores_nothing_against_itself() -> None:
    drop = paired_drop([0.0] * 5, [0.0] * 5, relative=True)
    assert (drop.drop, drop.low, drop.high) == (0.0, 0.0, 0.0)


def test_points_and_percent() -> None:
    dense, method = [1.0, 0.5, 0.5, 0.0], [0.5, 0.5, 0.5, 0.0]
    points, percent = (paired_drop(dense, method, relative=relative) for relative in (False, True))
    assert (points.dense, points.method) == (0.5, 0.375)
    assert points.drop == pytest.approx(12.5)
    assert percent.drop == pytest.approx(25.0)
    assert points.low <= points.drop <= points.high
    assert percent.low <= percent.drop <= percent.high


def test_a_method_that_is_better_drops_below_zero() -> None:
    dense = scores(200, 0, 0.3)
    drop = paired_drop(dense, [1.0] * 200)
    assert drop.high < 0
    assert judge(drop, 0.0).verdict == "pass"


def test_losses_drop_by_their_rise() -> None:
    dense, method = [2.0, 4.0, 3.0, 3.0], [2.5, 4.0, 3.5, 3.2]
    points, percent = (
        paired_drop(dense, method, relative=relative, losses=True) for relative in (False, True)
    )
    assert points.drop == pytest.approx(30.0)
    assert percent.drop == pytest.approx(10.0)
    assert 0 <= percent.low < percent.drop < percent.high
    assert paired_drop(method, dense, losses=True).drop == pytest.approx(-30.0)
    one = paired_drop([2.0], [2.5], relative=True, losses=True)
    assert (one.low, one.high, judge(one, 1.0).verdict) == (-100.0, math.inf, "inconclusive")
    assert paired_drop([0.0] * 9, [0.1] * 9, relative=True, losses=True).low == math.inf
    with pytest.raises(ValueError, match="a loss is below 0"):
        paired_drop([1.0], [-0.5], losses=True)


def test_weights_make_it_a_ratio_of_sums() -> None:
    tokens, dense_right, method_right = [10, 1, 100], [5, 1, 90], [5, 0, 60]
    drop = paired_drop(
        np.divide(dense_right, tokens).tolist(), np.divide(method_right, tokens).tolist(), weights=tokens
    )
    assert drop.dense == pytest.approx(96 / 111)
    assert drop.method == pytest.approx(65 / 111)
    assert drop.drop == pytest.approx(100 * 31 / 111)


def test_a_weight_is_as_good_as_rows_of_one_cluster() -> None:
    dense, method, weights = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [3, 1, 2, 4]
    clusters = [str(row) for row, weight in enumerate(weights) for _ in range(weight)]
    repeated = [np.repeat(values, weights).tolist() for values in (dense, method)]
    once, often = paired_drop(dense, method, weights=weights), paired_drop(*repeated, clusters=clusters)
    assert (once.low, once.high) == pytest.approx((often.low, often.high))
    assert (once.drop, once.clusters) == pytest.approx((often.drop, often.clusters))
    assert (once.rows, often.rows) == (4, 10)


def test_the_interval_is_about_what_theory_says() -> None:
    differences = np.array([0.0, 0.3] * 200)
    drop = paired_drop([1.0] * 400, (1 - differences).tolist())
    half_width = 100 * 1.96 * differences.std() / math.sqrt(400)
    assert drop.low == pytest.approx(15 - half_width, abs=0.1)
    assert drop.high == pytest.approx(15 + half_width, abs=0.1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        dense, other = np.array(scores(120, seed, 0.8)), np.array(scores(120, seed + 1000, 0.9))
        drop = paired_drop(dense.tolist(), (dense * other).tolist(), resamples=1000, seed=seed)
        held += drop.low <= 8.0 <= drop.high  # 80 points, of which a tenth is lost
    assert 0.88 <= held / 200 <= 0.99


def test_rows_of_one_document_are_not_independent() -> None:
    dense = [1.0] * 100
    method = [float(row // 10 % 3 != 0) for row in range(100)]  # by document
    documents = [str(row // 10) for row in range(100)]
    rows, clustered = paired_drop(dense, method), paired_drop(dense, method, clusters=documents)
    assert clustered.drop == rows.drop
    assert clustered.clusters == 10
    assert clustered.high - clustered.low > 2 * (rows.high - rows.low)


def test_the_seed_decides() -> None:
    dense, method = scores(60, 1, 0.9), scores(60, 2, 0.7)
    assert paired_drop(dense, method, seed=5) == paired_drop(dense, method, seed=5)
    assert paired_drop(dense, method, seed=5) != paired_drop(dense, method, seed=6)


@pytest.mark.parametrize("relative", [False, True])
def test_one_row_or_one_document_decides_nothing(relative: bool) -> None:
    one = paired_drop([0.5], [0.4], relative=relative)
    document = paired_drop([0.5, 0.5], [0.5, 0.3], clusters=["a", "a"], relative=relative)
    for drop in (one, document):
        assert (drop.low, drop.high) == ((-100.0, 100.0))
        assert judge(drop, 1.0).verdict == judge(drop, 50.0).verdict == "inconclusive"


def test_two_rows() -> None:
    drop = paired_drop([1.0, 1.0], [1.0, 0.0])
    assert (drop.drop, drop.low, drop.high) == (50.0, 0.0, 100.0)
    assert judge(drop, 1.0).verdict == "inconclusive"


def test_rows_that_all_drop_alike() -> None:
    drop = paired_drop([0.75] * 9, [0.5] * 9)
    assert (drop.drop, drop.low, drop.high) == (25.0, 25.0, 25.0)
    assert judge(drop, 24.0).verdict == "fail"
    assert judge(drop, 25.0).verdict == "pass"


def test_a_relative_drop_where_dense_scores_nothing() -> None:
    better = paired_drop([0.0] * 6, [0.0, 1.0] * 3, relative=True)
    assert better.drop == -math.inf
    assert judge(better, 1.0).verdict == "pass"
    mixed = paired_drop([0.0, 0.0, 1.0], [1.0, 0.0, 0.0], relative=True)
    assert mixed.low == -math.inf
    assert not math.isnan(mixed.high)
    found = judge(mixed, 1.0)
    assert (found.verdict, found.rows_needed) == ("inconclusive", None)


@pytest.mark.parametrize(
    ("drop", "bound", "verdict", "rows_needed"),
    [
        (drop_of(0.2, -0.1, 0.5), 0.5, "pass", None),
        (drop_of(0.2, -0.1, 0.5), 1.0, "pass", None),
        (drop_of(2.0, 1.5, 2.5), 1.0, "fail", None),
        (drop_of(2.0, 1.0, 3.0), 1.0, "inconclusive", 101),  # half a width of 1 at a distance of 1
        (drop_of(0.5, -0.5, 1.5), 1.0, "inconclusive", 400),
        (drop_of(1.5, 0.5, 2.5), 1.0, "inconclusive", 400),
        (drop_of(1.0, 0.5, 1.5), 1.0, "inconclusive", None),
    ],
)
def test_judge(drop: Drop, bound: float, verdict: str, rows_needed: int | None) -> None:
    found = judge(drop, bound)
    assert (found.verdict, found.rows_needed, found.bound) == (verdict, rows_needed, bound)


def test_the_rows_that_are_said_to_decide_do() -> None:
    def measured(rows: int) -> Drop:
        lost = [float(row % 20 == 0) for row in range(rows)]
        return paired_drop([1.0] * rows, [1 - loss for loss in lost])

    few = judge(measured(100), 8.0)
    assert few.verdict == "inconclusive"
    assert few.rows_needed is not None
    assert judge(measured(20 * math.ceil(few.rows_needed / 20 * 1.2)), 8.0).verdict == "pass"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "at least one"),
        (([1.0], [1.0, 0.0]), "1 dense scores, 2 of the method"),
        (([1.0], [1.5]), "a score is not between 0 and 1"),
        (([math.nan], [1.0]), "a score is not between 0 and 1"),
    ],
)
def test_scores_that_cannot_be(arguments: tuple[list[float], list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_drop(*arguments)


def test_weights_and_clusters_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="a weight is not above 0"):
        paired_drop([1.0, 1.0], [1.0, 0.0], weights=[1, 0])
    with pytest.raises(ValueError, match="1 clusters of 2 rows"):
        paired_drop([1.0, 1.0], [1.0, 0.0], clusters=["a"])


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
def test_parse_drop(text: str, expected: tuple[float, bool]) -> None:
    assert parse_drop(text) == expected


@pytest.mark.parametrize("text", ["1", "", "pt", "-1pt", "1 point", "1e2%", "nan%", "1,5pt", "101pt"])
def test_drops_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_drop(text)
    assert str(caught.value).startswith(f"--max-drop {text!r}: ")
