"""Whether a method scores worse than dense on the same documents: the drop, its interval, and a verdict.

Rows about one document are not independent, so a document is what counts: its drop is the mean over its rows,
and all documents weigh equally. Nothing else is supposed of how drops are spread (see `gaffke`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from pipeline.evaluate.gaffke import beyond

Verdict = Literal["pass", "fail", "inconclusive"]
TAIL = 0.025  # how often at most a pass, or a fail, may be wrong
_SLACK = 1e-9  # for the last bits of means
_WIDEST = 1e6  # times dense's mean: beyond any relative drop that is told
_HALVINGS = 50
FEW_DECIDE = "a few documents decide, of which the interval counts a change of at most 1 nat each"
NOTHING_PRUNED = "nothing was pruned: the method did to every row what dense does"
MOST_DOCUMENTS = 1_000_000  # more than anybody would take


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """How far a method scores below dense; negative where it scores above. Of losses, the other way round.

    `drop`, `low` and `high` are in points (hundredths of the score), or else, if `relative`, in percent of
    dense's mean. `low` can be -inf, only if `relative` and if dense scores 0; of losses `high` can be inf.
    """

    rows: int
    documents: int
    dense: float  # mean over documents
    method: float
    relative: bool
    drop: float
    low: float
    high: float
    confidence: float = 1 - 2 * TAIL

    @property
    def interval(self) -> str:
        """`-0.10 to 0.32`."""
        return f"{hundredths(self.low)} to {hundredths(self.high)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What an interval says about a bound, and, if inconclusive, why, or how many documents would decide."""

    verdict: Verdict
    bound: float  # in the unit of the drop
    documents_needed: int | None = None  # in all; None: decided, or no number of documents would decide
    reason: str | None = None  # why these documents can tell nothing, however many they are

    def of_pruned(self, pruned: bool) -> Judgement:
        """The same, but for a pass of rows of which nothing was `pruned`: they show nothing of the method."""
        if pruned or self.verdict == "fail" or self.reason is not None:
            return self
        return replace(self, verdict="inconclusive", documents_needed=None, reason=NOTHING_PRUNED)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Both sides' scores by document.

    Of losses, which have no largest value, a document's rise beyond what is allowed counts as at most 1 in
    what is said of other documents; whatever is said, the drop of these, each in full, does not contradict.
    """

    rows: int
    dense_D: np.ndarray = field(repr=False)
    worse_D: np.ndarray = field(repr=False)  # dense's score less the method's, or the other way of losses
    relative: bool = False
    losses: bool = False

    @classmethod
    def of(
        cls,
        dense: Sequence[float],
        method: Sequence[float],
        *,
        documents: Sequence[str] | None = None,
        relative: bool = False,
        losses: bool = False,
    ) -> Paired:
        """Of rows: scores from 0 to 1; with `losses` from 0 up, lower is better, and drops are `relative`.

        `documents` says of which one each row is; without it each row is one. Raises `ValueError` for no
        rows, and for numbers that cannot be these.
        """
        dense_N, method_N = _checked(dense, method, math.inf if losses else 1)
        worse_N = method_N - dense_N if losses else dense_N - method_N
        _, which_N = np.unique(
            np.arange(len(dense_N)) if documents is None else np.asarray(documents), return_inverse=True
        )
        if len(which_N) != len(dense_N):
            raise ValueError(f"{len(which_N)} documents of {len(dense_N)} rows")
        rows_D = np.bincount(which_N)
        return cls(
            rows=len(dense_N),
            # differences are summed, not sums subtracted: what does not differ drops by exactly 0
            dense_D=np.bincount(which_N, dense_N) / rows_D,
            worse_D=np.bincount(which_N, worse_N) / rows_D,
            relative=relative or losses,
            losses=losses,
        )

    def drop(self) -> Drop:
        """The drop and its interval, whose ends are each wrong with a probability of at most `TAIL`."""
        dense, worse = float(self.dense_D.mean()), float(self.worse_D.mean())
        drop = _ratio(worse, dense) if self.relative else worse
        low, high = self._ends()
        if self.losses:  # whose interval counts large rises as 1, and the drop does not
            low, high = min(low, drop), max(high, drop)
        return Drop(
            rows=self.rows,
            documents=len(self.dense_D),
            dense=dense,
            method=dense + worse if self.losses else dense - worse,
            relative=self.relative,
            drop=100 * drop,
            low=100 * low,
            high=100 * high,
        )

    def judge(self, bound: float) -> Judgement:
        """Whether the drop is within `bound`, in its unit: all of its interval has to be on one side."""
        if (reason := self.no_room(bound)) is not None:
            return Judgement(verdict="inconclusive", bound=bound, reason=reason)
        verdict: Verdict | None = None
        if self.p_beyond(bound) <= TAIL:
            verdict = "pass"
        elif self.p_within(bound) <= TAIL:
            verdict = "fail"
        if verdict is not None and verdict != self.judge_rows(bound).verdict:  # of losses alone
            return Judgement(verdict="inconclusive", bound=bound, reason=FEW_DECIDE)
        if verdict is not None:
            return Judgement(verdict=verdict, bound=bound)
        return Judgement(verdict="inconclusive", bound=bound, documents_needed=self._needed(bound))

    def judge_rows(self, bound: float) -> Judgement:
        """Whether these documents alone, and no others, lost no more than `bound`, in its unit."""
        if (reason := self.no_room(bound)) is not None:
            return Judgement(verdict="inconclusive", bound=bound, reason=reason)
        excess_D = self._in_full(bound / 100)
        return Judgement(verdict="pass" if excess_D.mean() <= _SLACK else "fail", bound=bound)

    def p_beyond(self, bound: float, documents: float | None = None) -> float:
        """The p value of a drop beyond `bound`: where it is small, the drop is within.

        `documents`: as though there were so many, of the kinds that there are.
        """
        values_D, _, most = self._excess(bound / 100)
        return _p(values_D, most, documents)

    def p_within(self, bound: float, documents: float | None = None) -> float:
        """The p value of a drop within `bound`: where it is small, the drop is beyond."""
        values_D, least, _ = self._excess(bound / 100)
        return _p(-values_D, -least, documents)

    def no_room(self, bound: float) -> str | None:
        """Why no drop beyond `bound` could show, if so: scores have nothing left to lose."""
        dense = float(self.dense_D.mean())
        if self.losses or (dense > 0 if self.relative else 100 * dense > bound):
            return None
        return (
            f"there is no room to lose: the score that the method is held against is {100 * dense:.2f} points"
        )

    def _excess(self, bound: float) -> tuple[np.ndarray, float, float]:
        """(D,) what documents lost beyond what they may, and the least and the most that they could have."""
        values_D = self._in_full(bound)
        if self.losses:
            return values_D.clip(-1, 1), -1.0, 1.0
        # of a score that was 1 and is 0, or 0 and is 1
        return values_D, -1.0 - (0 if self.relative else bound), 1.0 - bound

    def _in_full(self, bound: float) -> np.ndarray:
        """(D,) what documents lost beyond what they may."""
        return self.worse_D - (bound * self.dense_D if self.relative else bound)

    def _ends(self) -> tuple[float, float]:
        """Where the p values are `TAIL`; they fall and rise with the bound."""
        least, most = (-_WIDEST, _WIDEST if self.losses else 1.0) if self.relative else (-1.0, 1.0)
        high = _crossing(lambda bound: self.p_beyond(100 * bound) <= TAIL, least, most)
        low = -_crossing(lambda bound: self.p_within(-100 * bound) <= TAIL, -most, -least)
        if self.relative:
            low = -math.inf if low <= 0.999 * -_WIDEST else low
            high = math.inf if self.losses and high >= 0.999 * _WIDEST else high
        return low, high

    def _needed(self, bound: float) -> int | None:
        """About how many documents like these would decide."""
        have = len(self.dense_D)

        def decides(documents: float) -> bool:
            return min(self.p_beyond(bound, documents), self.p_within(bound, documents)) <= TAIL

        if not decides(MOST_DOCUMENTS):
            return None
        least, most = float(have), float(MOST_DOCUMENTS)
        while most - least > 0.5:
            middle = math.sqrt(least * most)
            least, most = (least, middle) if decides(middle) else (middle, most)
        return max(math.ceil(most), have + 1)


def hundredths(value: float) -> str:
    """An end of an interval, or a drop, as it is told."""
    if math.isinf(value):
        return "any" if value > 0 else "-any"
    return f"{round(value, 2) + 0:.2f}"  # adding 0 takes the sign from a zero


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several gates that all have to pass."""
    found = set(verdicts)
    order: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
    return next(verdict for verdict in order if verdict in found)


def fewest_documents(bound: float) -> int | None:
    """How many documents pass a bound, in points or percent, if none loses anything; None: none do."""
    if bound <= 0:
        return None
    return 1 if bound >= 100 else math.ceil(math.log(TAIL) / math.log1p(-bound / 100))


def smallest_bound(documents: int) -> float:
    """The smallest bound, in points or percent, that so many documents pass if none loses anything.

    Rounded up to a tenth.
    """
    return math.ceil(1000 * (1 - TAIL ** (1 / documents)) + 1e-9) / 10


def _p(values_D: np.ndarray, most: float, documents: float | None) -> float:
    values_U, counts_U = np.unique(values_D, return_counts=True)
    times = 1.0 if documents is None else documents / len(values_D)
    return float(beyond(values_U[None], most, counts_U * times)[0])


def _crossing(is_small: Callable[[float], bool], least: float, most: float) -> float:
    """The least number for which a falling p value is small; `most` if it is small for none."""
    if is_small(least):
        return least
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (least, middle) if is_small(middle) else (middle, most)
    return most


def _ratio(worse: float, dense: float) -> float:
    # where dense scores 0, a method that does too has lost nothing, and any other is beyond any share
    return worse / dense if dense > 0 else 0.0 if worse == 0 else math.copysign(math.inf, worse)


def _checked(
    dense: Sequence[float], method: Sequence[float], highest: float
) -> tuple[np.ndarray, np.ndarray]:
    dense_N, method_N = np.asarray(dense, np.float64), np.asarray(method, np.float64)
    if not dense_N.ndim == 1 or not dense_N.shape == method_N.shape or not len(dense_N):
        raise ValueError(
            f"{len(dense)} dense scores and {len(method)} of the method: must be equally many, at least one"
        )
    for scores_N in (dense_N, method_N):
        if not (np.isfinite(scores_N) & (scores_N >= 0) & (scores_N <= highest)).all():
            raise ValueError("a loss is below 0" if highest > 1 else "a score is not between 0 and 1")
    return dense_N, method_N
