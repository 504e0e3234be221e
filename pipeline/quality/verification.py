"""Candidates that a search has found, held against the bounds on cases that it did not see."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.quality.bounds import Bounds, Verified, holds
from pipeline.quality.evaluate import Case, CaseScore
from pipeline.quality.forced import Forced
from pipeline.quality.search import HOPELESS, Trial
from pipeline.quality.workbench import DENSE, Workbench, slowdown

TIMED = 16  # cases, more of which would tell little more of the speed


@dataclass(frozen=True, kw_only=True)
class Verification:
    """One candidate on the cases held out; without time for all of them it holds nothing."""

    trial: Trial
    scores: tuple[CaseScore, ...]
    gates: tuple[Verified, ...]
    dense_ttft_ms: float  # mean over the cases that both were timed on, in turns
    ttft_ms: float  # that, times the weighted median ratio of the two
    expected_drop: float  # by its divergence from dense, in the unit of the main bound
    complete: bool
    diverges: bool  # its own drop is not conclusive, and the one expected is beyond the bound
    holds: bool  # within every bound, and faster than dense

    @property
    def speed_up(self) -> float:
        return self.dense_ttft_ms / self.ttft_ms

    @property
    def worst_gate(self) -> Verified:
        """The one that comes nearest to its bound, or exceeds it most."""
        return max(self.gates, key=lambda gate: gate.excess)

    @property
    def excess(self) -> float:
        """How far the end of its interval is beyond its bound; negative within."""
        return self.worst_gate.excess

    @property
    def words(self) -> str:
        """`holds`, or why not."""
        if self.holds:
            return "holds"
        if not self.complete:
            return "given up"
        if self.diverges:
            return "diverges"
        verdicts = {gate.judgement.verdict for gate in self.gates}
        if verdicts == {"pass"}:
            return "not faster"
        return "fails" if "fail" in verdicts else "too few rows"


def timed_places(cases: Sequence[Case]) -> set[int]:
    """The places of cases that are timed: of all lengths, as the first ones may all be short."""
    by_length = sorted(range(len(cases)), key=lambda place: cases[place].document.prompt_tokens)
    count = min(TIMED, len(cases))
    return {by_length[(2 * n + 1) * len(cases) // (2 * count)] for n in range(count)}


@dataclass(frozen=True, kw_only=True)
class Verifier:
    """The cases held out, and what dense makes of them.

    With `accept_inconclusive` a drop is taken that is within its bound while its interval is not. On few rows
    that is mostly chance: the divergence, which is known far better, must not let a larger one be expected.
    """

    bench: Workbench
    cases: Sequence[Case]
    dense: Sequence[CaseScore]
    forced: Sequence[Forced]  # what dense predicted in them, to diverge from
    bounds: Bounds
    price: float  # drop for a divergence of a nat a token, as the search has learned
    accept_inconclusive: bool
    seed: int = 0

    def run(self, trials: Sequence[Trial], seconds_left: Callable[[], float]) -> Iterator[Verification]:
        """From the fastest on, until one holds. Where time is left for one alone, that is the mildest."""
        waiting = list(trials)
        while waiting:
            expected = sum(score.ttft_ms for score in self.dense) / 1e3
            if seconds_left() <= 0:
                return
            trial = waiting.pop(0 if seconds_left() >= 2 * expected else -1)
            verification = self.verify(trial, seconds_left)
            yield verification
            if verification.holds:
                return

    def verify(self, trial: Trial, seconds_left: Callable[[], float]) -> Verification:
        scores: list[CaseScore] = []
        timed: list[
            tuple[float, float]
        ] = []  # dense, the candidate: by turns, lest a busy moment count for one
        third, timed_at = -(-len(self.cases) // 3), timed_places(self.cases)
        for place, case in enumerate(self.cases):
            if seconds_left() <= 0:
                break
            scores.append(self.bench.run(trial.candidate.variant, case, dense=self.forced[place]).score)
            if place in timed_at:
                timed.append((self.bench.run(DENSE, case).score.ttft_ms, scores[-1].ttft_ms))
            if place + 1 == third < len(self.cases) and self.bounds.hopeless(
                self.dense[:third], scores, HOPELESS
            ):
                break
        dense = self.dense[: len(scores)]
        complete = len(scores) == len(self.cases)
        gates = tuple(self.bounds.verify(dense, scores, self.seed))
        dense_ms = statistics.fmean(before for before, _ in timed) if timed else 0.0
        ttft_ms = dense_ms * slowdown(*zip(*timed, strict=True)) if timed else 1.0
        expected = self.price * statistics.fmean([score.divergence or 0.0 for score in scores] or [0.0])
        within = complete and holds(gates, accept_inconclusive=self.accept_inconclusive)
        diverges = within and not holds(gates) and expected > self.bounds.main.value
        return Verification(
            trial=trial,
            scores=tuple(scores),
            gates=gates,
            dense_ttft_ms=dense_ms,
            ttft_ms=ttft_ms,
            expected_drop=expected,
            complete=complete,
            diverges=diverges,
            holds=within and not diverges and ttft_ms < dense_ms,
        )
