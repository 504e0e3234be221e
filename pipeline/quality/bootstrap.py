"""Whether a method scores worse than dense on the same rows: a paired bootstrap of the drop, and a verdict.

The interval is the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13). Rows about one document
are not independent, so documents are resampled rather than rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["pass", "fail", "inconclusive"]
_SLACK = 1e-9  # for the last bits of sums, in points or percent
_DRAWN_AT_ONCE = 1 << 21  # entries of the matrix of drawn clusters


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """How far a method scores below dense; negative where it scores above. Of losses, the other way round.

    `drop`, `low` and `high` are in points (hundredths of the score), or else, if `relative`, in percent of
    dense's mean. `low` can be -inf, only if `relative` and if dense scores 0 on the rows or nearly all; of
    losses `high` can be inf.
    """

    rows: int
    clusters: int
    dense: float  # mean score
    method: float
    relative: bool
    drop: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What an interval says about a bound, and, if inconclusive, about how many rows would decide."""

    verdict: Verdict
    bound: float  # in the unit of the drop
    rows_needed: int | None = None  # in all; None: decided, or no number of rows would decide


def paired_drop(
    dense: Sequence[float],
    method: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    clusters: Sequence[str] | None = None,
    relative: bool = False,
    losses: bool = False,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Drop:
    """The drop of the mean score, and its interval over resampled rows, or clusters of them.

    All sequences are as long as each other, at least one row. Scores are between 0 and 1. With `losses` they
    are from 0 up, lower is better, and the drop is a rise. With `weights`, for example the tokens of which a
    score is the share that is right, means are weighted: sums over sums, both resampled. With `clusters`, the
    document of each row, whole clusters are resampled.

    Where no row differs the drop and both ends are exactly 0. Otherwise a single cluster shows no spread, and
    its interval is all that scores can differ by. Of a few clusters, fewer than about 20, the interval is
    narrower than it claims. Raises `ValueError` for numbers that cannot be these.
    """
    dense_N, method_N, weights_N = _checked(dense, method, weights, math.inf if losses else 1)
    worse_N = method_N - dense_N if losses else dense_N - method_N
    _, cluster_N = np.unique(np.arange(len(dense_N)) if clusters is None else clusters, return_inverse=True)
    if len(cluster_N) != len(dense_N):
        raise ValueError(f"{len(cluster_N)} clusters of {len(dense_N)} rows")
    # Differences are summed, not sums subtracted: what does not differ drops by 0 and not by a last bit.
    columns = (weights_N, weights_N * dense_N, weights_N * worse_N)
    sums_C3 = np.stack([np.bincount(cluster_N, column) for column in columns], axis=1)
    weight, dense_sum, _ = total_3 = sums_C3.sum(0)
    drop = float(_drops(total_3[None], relative)[0])
    if not sums_C3[:, 2].any() and (dense_N == method_N).all():
        low = high = 0.0
    elif len(sums_C3) == 1:
        low, high = _widest(dense_sum / weight, relative, losses)
    else:
        drops_R = _drops(_resampled(sums_C3, resamples, seed), relative)
        tail = (1 - confidence) / 2
        # No interpolation: between -inf and a number there is none.
        low, high = map(float, np.quantile(drops_R, (tail, 1 - tail), method="inverted_cdf"))
    return Drop(
        rows=len(dense_N),
        clusters=len(sums_C3),
        dense=float(np.average(dense_N, weights=weights_N)),
        method=float(np.average(method_N, weights=weights_N)),
        relative=relative,
        drop=drop,
        low=low,
        high=high,
        confidence=confidence,
    )


def judge(drop: Drop, bound: float) -> Judgement:
    """Whether the drop is within `bound`, in its unit: as far as all of its interval is on one side of it.

    `rows_needed` takes the drop for right, and the interval to shrink with the square root of the rows.
    """
    if drop.low > bound + _SLACK:
        return Judgement(verdict="fail", bound=bound)
    if drop.high <= bound + _SLACK:
        return Judgement(verdict="pass", bound=bound)
    distance, half_width = abs(bound - drop.drop), (drop.high - drop.low) / 2
    if distance <= _SLACK or not math.isfinite(half_width / distance):
        return Judgement(verdict="inconclusive", bound=bound)
    needed = math.ceil(drop.rows * (half_width / distance) ** 2)
    return Judgement(verdict="inconclusive", bound=bound, rows_needed=max(needed, drop.rows + 1))


def _checked(
    dense: Sequence[float], method: Sequence[float], weights: Sequence[float] | None, highest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    dense_N, method_N = np.asarray(dense, np.float64), np.asarray(method, np.float64)
    weights_N = np.ones_like(dense_N) if weights is None else np.asarray(weights, np.float64)
    if not dense_N.ndim == 1 or not dense_N.shape == method_N.shape == weights_N.shape or not len(dense_N):
        raise ValueError(
            f"{len(dense)} dense scores, {len(method)} of the method and {len(weights_N)} weights: must be"
            " equally many, at least one"
        )
    for scores_N in (dense_N, method_N):
        if not (np.isfinite(scores_N) & (scores_N >= 0) & (scores_N <= highest)).all():
            raise ValueError("a loss is below 0" if highest > 1 else "a score is not between 0 and 1")
    if not (np.isfinite(weights_N) & (weights_N > 0)).all():
        raise ValueError("a weight is not above 0")
    return dense_N, method_N, weights_N


def _resampled(sums_C3: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(R, 3): sums over as many clusters as there are, drawn with replacement."""
    count = len(sums_C3)
    rng = np.random.default_rng(seed)
    parts, step = [], max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, resamples, step):
        drawn_RC = rng.integers(0, count, (min(step, resamples - start), count))
        # Column by column, for a gather of all three at once takes three times the memory.
        parts.append(np.stack([column_C[drawn_RC].sum(1) for column_C in sums_C3.T], axis=1))
    return np.concatenate(parts)


def _drops(sums_R3: np.ndarray, relative: bool) -> np.ndarray:
    weight_R, dense_R, lost_R = sums_R3.T
    if not relative:
        return 100 * lost_R / weight_R
    # Where dense scores 0, a method that does too has lost nothing, and any other is beyond any share.
    at_nothing_R = np.where(lost_R == 0, 0.0, np.copysign(np.inf, lost_R))
    return np.where(dense_R > 0, 100 * lost_R / np.where(dense_R > 0, dense_R, 1), at_nothing_R)


def _widest(dense: float, relative: bool, losses: bool) -> tuple[float, float]:
    """The drops that scores between 0 and 1 allow, or losses from 0 up."""
    if losses:
        return -100.0 * (1 if relative else dense), math.inf
    if not relative:
        return -100.0, 100.0
    return (-100 * (1 - dense) / dense if dense > 0 else -math.inf), 100.0
