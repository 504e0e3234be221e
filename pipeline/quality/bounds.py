"""What a setting may lose: one bound on right tokens over all rows, and one on each kind of needles found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.quality.bootstrap import Drop, Judgement, judge, paired_drop
from pipeline.quality.evaluate import CaseScore
from pipeline.settings.calibrate import CalibrateConfig
from pipeline.settings.parse import parse_drop

NEEDLES = "needles-"  # the beginning of the tasks that are gates of their own
_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A largest drop: points of the score, or percent of dense's."""

    value: float
    relative: bool

    @classmethod
    def of(cls, text: str, flag: str) -> Bound:
        """`1pt` or `1%`. Raises ConfigError."""
        value, relative = parse_drop(text, flag)
        return cls(value=value, relative=relative)

    @property
    def unit(self) -> str:
        return "%" if self.relative else "pt"

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class Verified:
    """One gate's drop with its interval, and what that says about its bound."""

    gate: str
    drop: Drop
    judgement: Judgement
    one_row: float  # what a row more or less that is right changes the drop by

    @property
    def is_within(self) -> bool:
        """Whether the drop itself is; of needles so few that one is more than the bound, one may be lost."""
        allowed = max(self.judgement.bound, self.one_row) if self.is_needles else self.judgement.bound
        return self.drop.drop <= allowed + _SLACK

    @property
    def excess(self) -> float:
        """How far the end of its interval is beyond its bound; negative within."""
        return self.drop.high - self.judgement.bound

    @property
    def is_needles(self) -> bool:
        return self.gate.startswith(NEEDLES)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The main bound, and that of each kind of needles. A score is a mean over rows."""

    main: Bound
    needles: Bound
    main_name: str  # the score of the rows: token accuracy, or agreement with dense

    @classmethod
    def of(cls, config: CalibrateConfig) -> Bounds:
        """Those that a calibration is given."""
        return cls(
            main=Bound.of(str(config.max_drop), "--max-drop"),
            needles=Bound.of(config.needle_drop, "--needle-drop"),
            main_name="token accuracy" if config.has_references else "agreement",
        )

    def drops(self, dense: Sequence[CaseScore], scores: Sequence[CaseScore]) -> dict[str, float]:
        """Of each gate; the main one is there even without rows, with 0."""
        parts = self._parts(dense, scores)
        drops = {name: self._drop(name, *pair, resamples=1).drop for name, pair in parts.items()}
        return {self.main_name: 0.0, **drops}

    def surely_exceeded(self, dense: Sequence[CaseScore], scores: Sequence[CaseScore]) -> bool:
        """Whether even the favourable end of some interval is beyond its bound: no mere chance."""
        return any(each.judgement.verdict == "fail" for each in self.verify(dense, scores, resamples=1000))

    def hopeless(self, dense: Sequence[CaseScore], scores: Sequence[CaseScore], times: float) -> bool:
        """Whether the main drop is so many times its bound, and no mere chance; needles alone are too few."""
        rows = self._parts(dense, scores).get(self.main_name)
        if rows is None:
            return False
        drop, bound = self._drop(self.main_name, *rows, resamples=1000), self.main.value
        return drop.drop > times * bound + _SLACK and judge(drop, bound).verdict == "fail"

    def verify(
        self, dense: Sequence[CaseScore], scores: Sequence[CaseScore], seed: int = 0, resamples: int = 10_000
    ) -> list[Verified]:
        """Every gate, with its bootstrapped interval."""
        verified = []
        for name, pair in self._parts(dense, scores).items():
            drop, bound = self._drop(name, *pair, resamples=resamples, seed=seed), self.bound_of(name)
            one_row = 100 / drop.rows / (drop.dense if bound.relative and drop.dense else 1.0)
            judgement = judge(drop, bound.value)
            verified.append(Verified(gate=name, drop=drop, judgement=judgement, one_row=one_row))
        return verified

    def bound_of(self, gate: str) -> Bound:
        return self.needles if gate.startswith(NEEDLES) else self.main

    def _parts(
        self, dense: Sequence[CaseScore], scores: Sequence[CaseScore]
    ) -> dict[str, tuple[list[CaseScore], list[CaseScore]]]:
        parts: dict[str, tuple[list[CaseScore], list[CaseScore]]] = {}
        for base, score in zip(dense, scores, strict=True):
            gate = score.task if score.task.startswith(NEEDLES) else self.main_name
            bases, own = parts.setdefault(gate, ([], []))
            bases.append(base)
            own.append(score)
        return parts

    def _drop(
        self,
        gate: str,
        dense: Sequence[CaseScore],
        scores: Sequence[CaseScore],
        *,
        resamples: int,
        seed: int = 0,
    ) -> Drop:
        return paired_drop(
            [score_of(score) for score in dense],
            [score_of(score) for score in scores],
            clusters=[score.document_key for score in scores],
            relative=self.bound_of(gate).relative,
            resamples=resamples,
            seed=seed,
        )


def score_of(score: CaseScore) -> float:
    """From 0 to 1: whether a needle is found, or the share of a right answer's tokens that are predicted."""
    return float(score.found) if score.task.startswith(NEEDLES) else score.correct / score.tokens


def holds(verified: Sequence[Verified], *, accept_inconclusive: bool = False) -> bool:
    """Whether every gate passes; `accept_inconclusive` takes one whose own drop is within the bound."""
    verdicts = ((gate.judgement.verdict, gate.is_within) for gate in verified)
    return all(
        verdict == "pass" or (accept_inconclusive and verdict == "inconclusive" and within)
        for verdict, within in verdicts
    )
